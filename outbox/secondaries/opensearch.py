"""A search index as a secondary: OpenSearch and Elasticsearch, by bulk writes with external versions."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from outbox.secondaries.opensearch_fresh import RebuildableSearch
from outbox.secondaries.opensearch_http import ElasticsearchHttp, OpenSearchHttp
from outbox.secondaries.opensearch_secondary import BULK_BYTES, TIMEOUT, ContentMapping

if TYPE_CHECKING:
    from elasticsearch import AsyncElasticsearch
    from opensearchpy import AsyncOpenSearch

__all__ = ["ElasticsearchSecondary", "OpenSearchSecondary"]


class OpenSearchSecondary(RebuildableSearch):
    """Keeps resources in OpenSearch, one index for each resource type, through opensearch-py.

    `search_name(type)` is what users search: an alias of `prefix` and the type whose filter hides tombstones. A
    document holds the resource verbatim under `content`, beside `tenant_id`, `resource_type`, `resource_id`,
    `position`, `version`, `deleted` and `digest`. `mapping` is the mapping of `content`, or a function from the
    resource type to it; by default it is dynamic: no guessing of dates, numbers as `double`, malformed values kept but
    not indexed, and resources inside resources kept but not indexed. `settings` are index settings with dotted names
    (`{"index.number_of_shards": 3}`), used when an index is created. `bulk_bytes` caps one request, `timeout` its
    duration. `verify_content=False` makes scans trust the stored digests, which is cheaper and no proof.

    A client handed in stays its owner's to close. The guard against old writes lives in the index: a server that loses
    its data loses it too.
    """

    def __init__(
        self,
        backend_id: str,
        client_or_url: AsyncOpenSearch | str,
        *,
        prefix: str = "outbox",
        mapping: ContentMapping | None = None,
        settings: Mapping[str, Any] | None = None,
        bulk_bytes: int = BULK_BYTES,
        timeout: timedelta = TIMEOUT,
        verify_content: bool = True,
    ) -> None:
        super().__init__(
            backend_id,
            partial(OpenSearchHttp, client_or_url),
            prefix=prefix,
            mapping=mapping,
            settings=settings,
            bulk_bytes=bulk_bytes,
            timeout=timeout,
            verify_content=verify_content,
        )


class ElasticsearchSecondary(RebuildableSearch):
    """Keeps resources in Elasticsearch, through elasticsearch-py; in all else as `OpenSearchSecondary`."""

    def __init__(
        self,
        backend_id: str,
        client_or_url: AsyncElasticsearch | str,
        *,
        prefix: str = "outbox",
        mapping: ContentMapping | None = None,
        settings: Mapping[str, Any] | None = None,
        bulk_bytes: int = BULK_BYTES,
        timeout: timedelta = TIMEOUT,
        verify_content: bool = True,
    ) -> None:
        super().__init__(
            backend_id,
            partial(ElasticsearchHttp, client_or_url),
            prefix=prefix,
            mapping=mapping,
            settings=settings,
            bulk_bytes=bulk_bytes,
            timeout=timeout,
            verify_content=verify_content,
        )
