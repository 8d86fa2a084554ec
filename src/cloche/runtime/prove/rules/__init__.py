"""What each guarantee needs to be seen. A rule takes the case and gives a guarantee, or None where it says nothing. Pure."""
