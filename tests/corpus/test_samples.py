"""Tests of movekd.corpus.samples."""

from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys

from movekd.corpus.samples import group_samples, sample_key
from movekd.corpus.tar import TarMember

keys = st.sampled_from(["a", "b", "d/a", "d.e/a", "d.e/b"])
suffixes = st.sampled_from(["jpg", "PNG", "left.png", "seg.0.png", "json", "txt"])


def group(names):
    """Return the names of each sample; members lie in the order given."""
    members = [TarMember(name, 512 * place, 0) for place, name in enumerate(names)]
    is_text = [name.endswith((".json", ".txt")) for name in names]
    images = [member for member, text in zip(members, is_text, strict=True) if not text]
    texts = [member for member, text in zip(members, is_text, strict=True) if text]
    return {
        sample.key: sorted(
            [member.name for member in sample.members]
            + [member.name for member, _, _ in sample.left_out]
        )
        for sample in group_samples(images, texts)
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(keys, suffixes), unique_by=lambda pair: (pair[0], pair[1].lower())))
def test_samples_are_webdatasets_where_its_rule_is_enough(drawn):
    """Neighbours, and texts named KEY.json or KEY.txt: there webdataset itself is the judge."""
    names = [f"{key}.{suffix}" for key, suffix in sorted(drawn, key=lambda pair: pair[0])]
    files = [{"fname": name, "data": name, "__url__": ""} for name in names]
    theirs = {
        sample["__key__"]: sorted(value for key, value in sample.items() if key[:2] != "__")
        for sample in group_by_keys(files)
    }
    assert group(names) == theirs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.permutations(["22.05.jpg", "22.05.json", "22.06.jpg", "22.06.json", "22.jpg", "3.txt"]))
def test_members_need_not_be_neighbours(names):
    """Webdataset would make a sample of each run, and one of all keys that begin with 22."""
    assert group(names) == {
        **{"22.05": ["22.05.jpg", "22.05.json"], "22.06": ["22.06.jpg", "22.06.json"]},
        **{"22": ["22.jpg"], "3": ["3.txt"]},
    }


def test_the_longest_common_key_counts():
    assert group(["x.input.jpg", "x.outputs.txt"]) == {"x": ["x.input.jpg", "x.outputs.txt"]}
    assert group(["a.jpg", "a.jpg.txt"]) == {"a.jpg": ["a.jpg", "a.jpg.txt"]}
    # a text that belongs to no longer key goes to the one sample below it, else to none
    assert group(["a.jpg", "a.jpg.txt", "a.json"]) == {"a.jpg": ["a.jpg", "a.jpg.txt", "a.json"]}
    assert group(["1.2.jpg", "1.2.txt", "1.3.txt", "1.4.jpg"]) == {
        **{"1.2": ["1.2.jpg", "1.2.txt"], "1.3": ["1.3.txt"], "1.4": ["1.4.jpg"]}
    }
    # only images: webdataset's key
    assert group(["4.left.png", "4.right.png"]) == {"4": ["4.left.png", "4.right.png"]}


def test_names_that_webdataset_ignores_have_a_key_too():
    names = ["a", "d/.hidden.jpg", ".b", "d.e/f", "g."]
    assert [sample_key(name) for name in names] == ["a", "d/.hidden", ".b", "d.e/f", "g"]
    assert group(["a", "a.txt"]) == {"a": ["a", "a.txt"]}


def test_one_text_of_a_kind_is_read():
    def texts(*names):
        members = [TarMember(name, place, 0) for place, name in enumerate(names)]
        (sample,) = group_samples([TarMember("a.jpg", 99, 0)], members)
        read = [text.name for text in (sample.json, sample.txt) if text is not None]
        return read, {member.name: kind for member, kind, _ in sample.left_out}

    assert texts("a.json", "a.txt") == (["a.json", "a.txt"], {})
    assert texts("a.json", "a.meta.json") == (["a.json"], {"a.meta.json": "unused_members"})
    assert texts("a.x.txt", "a.y.txt") == (
        [],
        {"a.x.txt": "ambiguous_texts", "a.y.txt": "ambiguous_texts"},
    )
