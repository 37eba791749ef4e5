"""Questions that are answered by yes or no, before and beside all statistics: tokens, templates, weights, the server."""
