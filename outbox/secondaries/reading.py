"""What adapters share when they read back what they hold."""

from __future__ import annotations

from outbox.content import content_digest

__all__ = ["digest_of"]


def digest_of(content: str | bytes) -> str:
    """Return the digest of a content as it is held now.

    What another hand made of it may be no JSON, or none that anybody can compare: the digest is then empty, equals
    nothing, and reconcile repairs it.
    """
    try:
        return content_digest(content.decode() if isinstance(content, bytes) else content)
    except (ValueError, ArithmeticError, RecursionError):
        return ""
