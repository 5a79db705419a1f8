"""Tables that every command shares, and their renderings."""
