"""How any call is read, submitted, awaited and answered, whatever route it came by."""
