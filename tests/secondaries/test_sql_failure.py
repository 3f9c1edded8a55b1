"""What a SQL driver says is classified by its SQLSTATE, and by the number where the driver keeps that to itself."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError

from outbox.secondaries.sql_failure import code_of, is_contention, is_fault_of_a_row


@pytest.mark.parametrize(
    ("number", "contended", "row_at_fault"),
    [
        (1213, True, False),
        (1205, True, False),
        (1048, False, True),
        (1062, False, True),
        (1264, False, True),
        (1292, False, True),
        (1366, False, True),
        (1406, False, True),
        (1644, False, True),
        (3819, False, True),
        (4025, False, True),
        (1114, False, False),
        (1290, False, False),
        (2013, False, False),
    ],
)
def test_a_driver_of_mysql_without_sqlstates_is_understood_by_its_numbers(
    number: int, contended: bool, row_at_fault: bool
):
    error = DBAPIError("insert", {}, Exception(number, "secret"))
    assert code_of(error) == str(number)
    assert (is_contention(error), is_fault_of_a_row(error)) == (contended, row_at_fault)
