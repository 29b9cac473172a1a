"""What people look at: sheets of a cache's images, the report of a run, the page in the browser."""
