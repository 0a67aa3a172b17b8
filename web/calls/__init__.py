"""How any call is read, waited for and answered, whatever route it came by."""
