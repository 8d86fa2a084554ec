"""Small things that are true for any program; nothing here knows of sandboxes."""
