"""What is particular to an OpenSandbox service."""
