"""Local stand-ins for public search services."""
