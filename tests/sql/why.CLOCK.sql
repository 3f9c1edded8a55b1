select statement_timestamp() as at
