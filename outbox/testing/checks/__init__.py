"""What a history is judged by: one function per way in which an outbox can fail."""
