"""What users need to test their own secondaries and applications: servers, the conformance suite."""
