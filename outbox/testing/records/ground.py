"""What all records are made of."""

from __future__ import annotations

import msgspec

__all__ = ["Entry", "Key", "Said"]

Key = tuple[str, str, str]
"""Tenant, type and id."""


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One event, or the state of one resource: where it stands, whose it is, and what it says."""

    position: int
    tenant_id: str
    resource_type: str
    resource_id: str
    digest: str = ""

    @property
    def key(self) -> Key:
        """Tenant, type and id."""
        return (self.tenant_id, self.resource_type, self.resource_id)


class Said(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True, tag_field="kind", tag=str.lower):
    """What every record has: when, and which process said it. Both are filled in as it is written."""

    at: int = 0
    process: str = ""
