"""Members that come, go and crash: a group that changes, under methods that do not know it."""
