"""The SyncEvent: one committed change of one resource, checked before any SQL and immutable ever after."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Self
from uuid import UUID, uuid4

import msgspec

from outbox.content import DEFAULT_LIMITS, Limits, encode_content
from outbox.errors import InvalidEvent
from outbox.names import check_name, check_tenant, checked_version, encode_headers, header_in

__all__ = ["FhirVersion", "Operation", "StoredResource", "SyncEvent"]

_Content = dict[str, Any] | str | bytes


class Operation(StrEnum):
    """What happened to the resource. Secondaries treat create and update alike: as an upsert."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"


class FhirVersion(StrEnum):
    """The FHIR release a resource is written in."""

    R4 = "4.0"
    R4B = "4.3"
    R5 = "5.0"
    R6 = "6.0"


class StoredResource(msgspec.Struct, frozen=True, kw_only=True):
    """A resource as a store holds it: the shape that a `ResourceStorage` answers in, and that `SyncEvent.bulk` takes.

    `deleted_at` set means a tombstone, whose content is ignored. `position` is that of the event a secondary's store
    holds, None for what was written before it was a secondary; a new event never takes it over.
    """

    resource_type: str
    resource_id: str
    content: dict[str, Any] | str | bytes | None = None
    tenant_id: str = "default"
    version: str | int | None = None
    fhir_version: str | None = None
    deleted_at: datetime | None = None
    position: int | None = None


class SyncEvent(msgspec.Struct, frozen=True, gc=False):
    """One change of one resource. Build it with `create`, `update`, `delete` or `bulk`, which check every field.

    `content` is exact JSON text, None exactly for a delete. `version` is the business's own version, carried and never
    compared. `position` and `created_at` are the database's, None until the event was recorded; secondaries
    compare `position`.
    """

    tenant_id: str
    resource_type: str
    resource_id: str
    operation: Operation
    content: str | None = None
    version: str | None = None
    fhir_version: str | None = None
    bulk_id: UUID | None = None
    headers: str | None = None
    position: int | None = None
    created_at: datetime | None = None

    @classmethod
    def create(
        cls,
        resource_type: str,
        resource_id: str,
        content: _Content,
        *,
        tenant_id: str = "default",
        version: str | int | None = None,
        fhir_version: str | None = None,
        headers: Mapping[str, str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Self:
        """Return the event of a resource that came to be. Raises `InvalidEvent`."""
        return cls._checked(
            Operation.CREATE, resource_type, resource_id, content, tenant_id, version, fhir_version, headers, limits
        )

    @classmethod
    def update(
        cls,
        resource_type: str,
        resource_id: str,
        content: _Content,
        *,
        tenant_id: str = "default",
        version: str | int | None = None,
        fhir_version: str | None = None,
        headers: Mapping[str, str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Self:
        """Return the event of a resource whose whole new state is `content`. Raises `InvalidEvent`."""
        return cls._checked(
            Operation.UPDATE, resource_type, resource_id, content, tenant_id, version, fhir_version, headers, limits
        )

    @classmethod
    def delete(
        cls,
        resource_type: str,
        resource_id: str,
        *,
        tenant_id: str = "default",
        version: str | int | None = None,
        fhir_version: str | None = None,
        headers: Mapping[str, str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Self:
        """Return the event of a resource that is gone. Raises `InvalidEvent`."""
        return cls._checked(
            Operation.DELETE, resource_type, resource_id, None, tenant_id, version, fhir_version, headers, limits
        )

    @classmethod
    def bulk(
        cls,
        resources: Iterable[StoredResource],
        *,
        tenant_id: str = "default",
        headers: Mapping[str, str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        bulk_id: UUID | None = None,
        start: int = 0,
    ) -> list[Self]:
        """Return one event per resource, all with one `bulk_id` (a new one); a tombstone becomes a delete.

        A bulk that comes in parts gives each its `bulk_id` and says where the part starts, for errors to name.
        Raises `InvalidEvent` before anything is returned when a resource is invalid or of another tenant.
        """
        group = bulk_id or uuid4()
        return [
            cls._of_bulk(index, resource, tenant_id, group, headers, limits)
            for index, resource in enumerate(resources, start)
        ]

    @property
    def key(self) -> tuple[str, str, str]:
        """(tenant_id, resource_type, resource_id): the unit of order."""
        return (self.tenant_id, self.resource_type, self.resource_id)

    def decoded(self) -> Any:
        """Return the content parsed into Python values, None for a delete. Costs a parse on every call."""
        return None if self.content is None else json.loads(self.content)

    def header(self, name: str) -> str | None:
        """Return one header, None without it: `correlation-id`, `actor` and `traceparent` are ours, others yours (D67).

        `headers` is all of them as JSON text. Costs a parse on every call.
        """
        return None if self.headers is None else header_in(self.headers, name)

    @classmethod
    def _of_bulk(
        cls,
        index: int,
        resource: StoredResource,
        tenant_id: str,
        bulk_id: UUID,
        headers: Mapping[str, str] | None,
        limits: Limits,
    ) -> Self:
        if resource.tenant_id != tenant_id:
            raise InvalidEvent(f"resources[{index}].tenant_id", "is not the tenant of this bulk")
        gone = resource.deleted_at is not None
        try:
            event = cls._checked(
                Operation.DELETE if gone else Operation.UPDATE,
                resource.resource_type,
                resource.resource_id,
                None if gone else resource.content,
                tenant_id,
                resource.version,
                resource.fhir_version,
                headers,
                limits,
            )
        except InvalidEvent as error:
            raise InvalidEvent(f"resources[{index}].{error.path}", error.problem) from None
        return msgspec.structs.replace(event, bulk_id=bulk_id)

    @classmethod
    def _checked(
        cls,
        operation: Operation,
        resource_type: str,
        resource_id: str,
        content: _Content | None,
        tenant_id: str,
        version: str | int | None,
        fhir_version: str | None,
        headers: Mapping[str, str] | None,
        limits: Limits,
    ) -> Self:
        check_name("resource_id", resource_id, limits.id_bytes)
        check_name("resource_type", resource_type, 128)
        check_tenant(tenant_id)
        if operation is not Operation.DELETE and content is None:
            raise InvalidEvent("content", f"is missing; only a delete has none, this is a {operation}")
        return cls(
            tenant_id,
            resource_type,
            resource_id,
            operation,
            None if content is None else encode_content(content, limits),
            checked_version(version),
            None if fhir_version is None else check_name("fhir_version", fhir_version, 16),
            None,
            None if not headers else encode_headers(headers, limits),
        )
