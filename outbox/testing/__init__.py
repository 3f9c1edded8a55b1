"""What users need to test their own secondaries and applications: servers, the suite, the failure lab, a relay."""
