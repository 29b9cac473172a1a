"""Show caches and runs: contact sheets, the report of a run, the web page, the machine check."""
