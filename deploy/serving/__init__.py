"""`deepretrieval serve`: a model over HTTP, for programs and for people."""
