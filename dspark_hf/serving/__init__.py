"""Many requests on one engine: rows that come and go, for `generate_batch` and for servers."""
