"""State: how big a page is, where things lie in it, which blocks a request holds."""
