"""The crash lab: real relays and writers, killed, paused and cut off on purpose, and a history that is checked."""
