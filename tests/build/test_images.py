import pytest
import torch

from movekd.build.images import image_transform, pixel_batches
from movekd.corpus.index import open_corpus

BATCHES = [[3, 1], [0], [5, 4, 2, 7]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_whatever_the_workers(corpus_dir, tiny_specs, num_workers) -> None:
    corpus = open_corpus(corpus_dir)
    transform = image_transform(tiny_specs[0], "crop")
    found = list(pixel_batches(corpus, transform, BATCHES, num_workers=num_workers))
    assert [batch.images for batch in found] == BATCHES
    for batch in found:
        assert batch.unreadable == {}
        expected = [transform(corpus.read_image(image)) for image in batch.images]
        for pixels, single in zip(batch.pixels_BCHW, expected, strict=True):
            assert torch.equal(pixels, torch.from_numpy(single))


def test_a_teachers_own_geometry_wins(tiny_specs) -> None:
    assert image_transform(tiny_specs[0], "pad").geometry == "pad"
    own = tiny_specs[0].with_changes(geometry="longest_side")
    assert image_transform(own, "pad").geometry == "longest_side"


def test_unreadable_images_keep_their_place(damaged_corpus, tiny_specs) -> None:
    data, damaged = damaged_corpus
    corpus = open_corpus(data)
    transform = image_transform(tiny_specs[0], "crop")
    batches = [[damaged, 0], [1, 2, damaged], [damaged]]
    one, two, three = pixel_batches(corpus, transform, batches, num_workers=0)
    assert list(one.unreadable) == [0]
    assert list(two.unreadable) == [2]
    assert torch.equal(one.pixels_BCHW[1], torch.from_numpy(transform(corpus.read_image(0))))
    assert (two.pixels_BCHW[2] == 0).all()
    assert list(three.unreadable) == [0]
    assert three.pixels_BCHW.numel() == 0
