from movekd.cache.reader import open_cache


def test_x(cache_dir) -> None:
    c = open_cache(cache_dir)
    print(c.teachers, c["clip"].layout, c["conv"].layout)
