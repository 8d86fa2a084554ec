"""The HTTP service: thin. It reads requests, calls the runtime, and writes what comes back."""
