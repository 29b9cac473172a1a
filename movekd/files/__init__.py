"""Files on disk: bounded reading of files of others, what belongs to movekd, locks of folders."""
