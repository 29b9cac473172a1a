import pytest
import yaml

from movekd.cache.spec import LIMITS, CacheSpec, load_spec, shipped_specs
from movekd.errors import ConfigError


@pytest.mark.parametrize("name", list(shipped_specs()))
def test_shipped_specs_are_named_after_their_files_and_survive_a_round_trip(name) -> None:
    spec = load_spec(name)
    assert spec.name == name
    again = CacheSpec.model_validate(spec.model_dump(mode="json"))
    assert again == spec
    assert again.fingerprint == spec.fingerprint


def test_the_fingerprint_changes_with_every_key_that_changes_what_is_stored(tiny_specs) -> None:
    spec = tiny_specs[0]
    changes = {
        "name": "other", "provider": "timm", "model": "m", "revision": "v2", "weights": "hub",
        "seed": 1, "model_args": {}, "image_size": 17, "geometry": "pad", "resample": "lanczos",
        "mean": (0.1, 0.2, 0.3), "std": (0.1, 0.2, 0.3), "fill": (0.0, 0.0, 0.0), "layer": -1,
        "cls": False, "cls_attention": False, "grid": 2, "codec": "float16",
        "compressor": "zstd", "calibration_images": 9, "cls_source": "attention_pool",
        "std_floor": 0.1, "cls_attention_heads": "mean",
        "recoded_from": [{"codec": "float16", "calibration": "0" * 32}],
    }  # fmt: skip
    assert {*changes, "description", "factory", *LIMITS} == set(CacheSpec.model_fields)
    fingerprints = {spec.with_changes(**{key: value}).fingerprint for key, value in changes.items()}
    for factory in ("mine:one", "mine:two"):
        fingerprints.add(spec.with_changes(provider="python", factory=factory).fingerprint)
    assert len(fingerprints | {spec.fingerprint}) == len(changes) + 3
    assert spec.with_changes(description="for people").fingerprint == spec.fingerprint
    for limit in LIMITS:
        assert spec.with_changes(**{limit: 0.1}).fingerprint == spec.fingerprint
    places = [spec.with_changes(weights=place).fingerprint for place in ("hub", "/a", "b.pth")]
    assert len(set(places)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imagesize": 3}, r"unknown key 'imagesize'. Did you mean 'image_size'\?"),
        ({"std": [1, 0, 1]}, "std: every value must be above 0"),
        ({"layer": "neck"}, "cls_attention is read in the block .* set layer to an index or last"),
        ({"cls_source": "pool"}, "cls_source: .*'attention_pool'"),
        ({"provider": "python"}, "provider python needs factory: package.module:function"),
        ({"factory": "mine:encoder"}, "factory goes with provider python, not transformers; drop"),
        ({"weights": "factory"}, "weights: factory goes with provider python, not transformers"),
        ({"provider": "python", "factory": "./mine.py:encoder"}, "factory: .*match pattern"),
        ({"provider": "python", "factory": "mine.encoder"}, "factory: .*match pattern"),
        (
            {"provider": "python", "factory": "mine:encoder", "cls_source": "attention_pool"},
            "cls_source is for the libraries' models; .*TeacherOutput",
        ),
        ({"layer": "first"}, "layer"),
        ({"grid": 0}, "grid"),
        ({"codec": "int9"}, "codec: .*'int8'"),
        ({"compressor": "gzip"}, "compressor"),
        ({"name": "../etc"}, "name: "),
        ({"image_size": -1}, "image_size: .*greater than 0"),
        ({"calibration_images": 0}, "calibration_images"),
        ({"mean": [123.7, 116.3, 103.5]}, "mean: .*divide values of 0..255 by 255"),
        ({"std": [58.4, 57.1, 57.4]}, "std: .*divide values of 0..255 by 255"),
        ({"std": [0.5, 0.5, float("inf")]}, "std: .*from 0 to 1"),
        ({"fill": [124, 116, 104]}, "fill: .*divide values of 0..255 by 255"),
        ({"fill": [float("nan")] * 3}, "fill: .*from 0 to 1"),
        ({"seed": 10**40}, "seed: .*less than 4294967296"),
        ({"seed": -1}, "seed: "),
        ({"image_size": 10**8}, "image_size: .*8192"),
        ({"grid": 10**20}, "grid"),
        ({"layer": 10**9}, "layer"),
        ({"max_error": float("nan")}, "max_error: .*finite"),
        ({"weights": "a\0b"}, "weights: .*without control characters"),
        ({"revision": "../../main"}, "revision: expected the name of a branch, a tag or a commit"),
        ({"model": "m" * 501}, "model: .*at most 500 characters"),
        ({"model_args": {"hidden_size": 0}}, "model_args: hidden_size must be from 1 to 32,768"),
        ({"model_args": {"image_size": [9, 10**5]}}, "model_args: image_size must be from 1 to"),
        ({"model_args": {"depth": 10**4}}, "model_args: depth must be from 1 to 1,000"),
        ({"model_args": {"eps": float("inf")}}, "model_args: eps is inf; expected a finite"),
        ({"model_args": {"a": {"b": {"c": {"d": {"e": 1}}}}}}, "a.b.c.d.e is nested more than"),
        ({"model_args": {"k" * 101: 1}}, "model_args: a key is .* at most 100 characters"),
        ({"model_args": {"k": [1] * 1001}}, "model_args: more than 1,000 values"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, tiny_specs, change, message) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_specs[0].model_dump(mode="json") | change))
    with pytest.raises(ConfigError, match=message) as caught:
        load_spec(str(path))
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        tiny_specs[0].with_changes(**change)


def test_weights_are_taken_from_the_folder_of_the_yaml_file(tmp_path, tiny_specs) -> None:
    content = tiny_specs[0].model_dump(mode="json")
    for weights, expected in (
        ("w/model.safetensors", str(tmp_path / "w" / "model.safetensors")),
        ("hub", "hub"),
        ("random", "random"),
        ("/abs/w", "/abs/w"),
        ("./factory", str(tmp_path / "factory")),
    ):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content | {"weights": weights}))
        assert load_spec(str(tmp_path / "mine.yaml")).weights == expected


def test_a_factory_names_the_model_unless_one_is_given(tiny_specs) -> None:
    content = tiny_specs[0].model_dump() | {"provider": "python", "factory": "mine.vit:encoder"}
    assert CacheSpec.model_validate(content | {"weights": "factory"}).weights == "factory"
    assert CacheSpec.model_validate(content).model == "tiny-clip"
    del content["model"]
    assert CacheSpec.model_validate(content).model == "mine.vit:encoder"


def test_attention_of_a_pool_needs_no_block(tiny_specs) -> None:
    for layer in ("last", "neck", -2):
        tiny_specs[0].with_changes(layer=layer, cls_source="attention_pool")


def test_an_unknown_teacher_names_the_nearest(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no teacher 'eva2'.*Did you mean 'eva02'\?.*Known: "):
        load_spec("eva2")
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_spec(str(tmp_path / "none.yaml"))
