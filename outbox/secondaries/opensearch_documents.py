"""What a search server holds: the names of its indices, and one document for every resource, deleted ones included."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from outbox.content import content_digest
from outbox.event import SyncEvent

__all__ = ["LIVE", "alias_name", "document_id", "document_text", "index_body", "index_name", "is_behind"]

# The filter of every alias: a search through one never meets a tombstone.
LIVE: dict[str, Any] = {"term": {"deleted": False}}

_NAME_BYTES = 180
_ID_BYTES = 512
_KEYWORD = {"type": "keyword"}
# A keyword declared without `ignore_above` takes any length; only dynamic ones stop at 256.
_OUR_FIELDS: dict[str, Any] = {
    "tenant_id": _KEYWORD,
    "resource_type": _KEYWORD,
    "resource_id": _KEYWORD,
    "position": {"type": "long"},
    "version": _KEYWORD,
    "deleted": {"type": "boolean"},
    "digest": {"type": "keyword", "index": False, "doc_values": False},
}
# Resources inside resources have no fixed shape: what is an object in one is text in the next, which is refused.
_FORMLESS = ("content.contained", "content.entry.resource", "content.parameter.resource")
_TEMPLATES: list[dict[str, Any]] = [
    *(
        {
            path.replace(".", "_"): {
                "path_match": path,
                "match_mapping_type": "object",
                "mapping": {"type": "object", "enabled": False},
            }
        }
        for path in _FORMLESS
    ),
    # One type for all numbers: a field first seen as 5 would otherwise be indexed without a later 5.5's decimals.
    {"integers": {"match_mapping_type": "long", "mapping": {"type": "double"}}},
    {"decimals": {"match_mapping_type": "double", "mapping": {"type": "double"}}},
]
_SETTINGS: dict[str, Any] = {
    "index.mapping.ignore_malformed": True,
    "index.mapping.total_fields.limit": 10_000,
    "index.mapping.depth.limit": 100,
}


def alias_name(prefix: str, resource_type: str) -> str:
    """Return the name to search and write under: `outbox-patient` for `Patient`.

    No two types share a name, although server names are lower case: a capital first letter and small ones after it are
    the rule, `_` marks a letter that breaks it (`MedicationRequest` is `medication_request`, `patient` is `_patient`)
    and `.xx` is a byte that is no ASCII letter or digit. Very long types end in a digest.
    """
    escaped = "".join(_escaped(letter, at == 0) for at, letter in enumerate(resource_type))
    if len(escaped) > _NAME_BYTES:
        # No escape starts with ".z", so this form never equals a plain one.
        escaped = f"{escaped[:64]}.z{_digest(resource_type)}"
    return f"{prefix}-{escaped}"


def index_name(prefix: str, resource_type: str) -> str:
    """Return the name of the index behind the alias, tombstones included; a search of `prefix-*` does not meet it."""
    return f"all.{alias_name(prefix, resource_type)}"


def is_behind(index: str, alias: str) -> bool:
    """Whether an index may stand behind an alias: the first, or one that was filled beside it and took its place."""
    return re.fullmatch(rf"all\.(?:[a-z]\.)?{re.escape(alias)}", index) is not None


def document_id(tenant_id: str, resource_id: str) -> str:
    """Return the `_id` of a resource: `tenant:id`, or `tenant#digest` where that is longer than a server allows.

    A tenant holds neither `:` nor `#`, so the two forms and two tenants never meet.
    """
    plain = f"{tenant_id}:{resource_id}"
    if len(plain.encode()) <= _ID_BYTES:
        return plain
    return f"{tenant_id}#{_digest(resource_id)}"


def document_text(event: SyncEvent) -> str:
    """Return the document of an event on one line: a tombstone for a delete, else a wrapper around the exact content.

    Line ends between the tokens of the content become spaces: the bulk format ends documents with them.
    """
    fields = {
        "tenant_id": event.tenant_id,
        "resource_type": event.resource_type,
        "resource_id": event.resource_id,
        "position": event.position,
        "version": event.version,
        "deleted": event.content is None,
    }
    if event.content is None:
        return _compact(fields)
    wrapper = _compact({**fields, "digest": content_digest(event.content)})
    content = event.content.replace("\n", " ").replace("\r", " ")
    return f'{wrapper[:-1]},"content":{content}}}'


def index_body(alias: str, content_mapping: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request that creates an index together with its alias."""
    content = {"type": "object", "dynamic": True} if content_mapping is None else content_mapping
    mappings = {
        "dynamic": False,
        "date_detection": False,
        "numeric_detection": False,
        "dynamic_templates": _TEMPLATES,
        "properties": {**_OUR_FIELDS, "content": content},
    }
    return {
        "settings": {**_SETTINGS, **settings},
        "mappings": mappings,
        "aliases": {alias: {"filter": LIVE}},
    }


def _escaped(letter: str, first: bool) -> str:
    if letter.isascii() and letter.isalpha():
        return letter.lower() if letter.isupper() is first else f"_{letter.lower()}"
    if letter.isascii() and letter.isdigit():
        return letter
    return "".join(f".{byte:02x}" for byte in letter.encode())


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _compact(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
