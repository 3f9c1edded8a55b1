"""Adapters, one file each; every one passes the conformance suite in `outbox.testing`."""
