"""One contract for every kind of language model: train, save, resume, export, load, ask.

What is compared with is stock transformers: the causal language model by itself, and the export as
its users load it.
"""

import pytest
import torch
import yaml
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
)

from exports import export
from movekd.corpus.conversations import Conversation
from movekd.corpus.index import open_corpus
from movekd.errors import ConfigError
from movekd.evaluate.chat import answer
from movekd.evaluate.generate import generate_answers
from movekd.student.checkpoint import load_student, part_of
from movekd.student.config import StudentConfig
from movekd.student.export.check import check_exports
from movekd.student.tokenization import IGNORED, tokenize_conversation
from movekd.student.vlm import build_vlm, image_features
from movekd.train.config import load_config
from movekd.train.run import build_data, build_model, train
from small_language_model import KINDS, SIZES, write_language_model

FAST = ("gemma3",)
slow = pytest.mark.slow
TRAINED = [name if name in FAST else pytest.param(name, marks=slow) for name in KINDS]
NOT_GEMMA = [name for name in KINDS if name != "gemma3"]
REAL_TOKENIZER = ("llama2", "mistral", "smollm2")
LOADED = [pytest.param(n, marks=slow) if n in REAL_TOKENIZER else n for n in KINDS]
TURNS = (("human", "<image>\nWhat is it?"), ("gpt", "A bus."), ("human", "How wide is it?"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folder of a small language model; each is written once."""
    written = {}

    def write(name):
        if name not in written:
            written[name] = write_language_model(name, tmp_path_factory.mktemp(name))
        return written[name]

    return write


@pytest.fixture(scope="module")
def config(models, kit, corpus_dir, tmp_path_factory):
    """Return the config of a run with a language model: two steps of finetune, each saved."""

    def make(name, **training):
        keys = {
            "recipe": "revised",
            "stage": "finetune",
            "student": {
                "vision_tower": str(kit.WEIGHTS / "clip"),
                "language_model": str(models(name)),
                "mole": None,
                "prompt": "chat_template",
            },
            "data": {"shards": str(corpus_dir)},
            "training": {
                "per_device_train_batch_size": 4,
                "max_steps": 2,
                "save_steps": 1,
                "learning_rate": 1.0e-3,
                "report_to": "none",
                "use_cpu": True,
                "seed": 3,
            },
        }
        path = tmp_path_factory.mktemp("config") / "student.yaml"
        path.write_text(yaml.safe_dump(keys))
        return load_config(path)

    return make


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """Return the output of such a run; each runs once."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp("run") / name
            train(config(name), done[name])
        return done[name]

    return run


def text_ids(name, tokenizer):
    ids = tokenizer("How wide is this image? It is 24 pixels wide. And 猫?")["input_ids"]
    return torch.tensor([ids])


@pytest.mark.parametrize("name", LOADED)
def test_inside_a_llava_it_gives_the_logits_of_the_stock_model(models, kit, name):
    student = build_vlm(student_config(kit, models(name)))
    stock = AutoModelForCausalLM.from_pretrained(models(name)).eval()
    ids = text_ids(name, student.tokenizer)
    with torch.no_grad():
        found = student.vlm.eval()(input_ids=ids).logits
        expected = stock(input_ids=ids).logits
    assert found.abs().max() > 1  # not a model that says nothing
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=0, atol=0)
    head, embedding = student.vlm.lm_head.weight, student.vlm.get_input_embeddings().weight
    assert head is not embedding
    assert torch.equal(head, embedding) == bool(stock.config.tie_word_embeddings)
    assert not student.vlm.config.text_config.tie_word_embeddings


def test_gemma_reads_image_features_as_its_own_class_does(models, kit):
    """Its embeddings of words are multiplied by sqrt(width), those of images are not."""
    student = build_vlm(student_config(kit, models("gemma3")))
    seen = {}
    language_model = student.vlm.model.language_model
    language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    image = student.tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.tensor([[7, *[image] * 36, 9]])
    with torch.no_grad():
        features, _ = image_features(student.vlm.eval(), pixels)
        student.vlm(input_ids=ids, mm_encoder_outputs={"image": features})
    assert SIZES["hidden_size"] == 32
    rows = student.vlm.get_input_embeddings().weight[[7, 9]]
    torch.testing.assert_close(seen["inputs_embeds"][0, 1:-1], features.pooler_output[0])
    torch.testing.assert_close(
        seen["inputs_embeds"][0, [0, -1]], rows * SIZES["hidden_size"] ** 0.5
    )


@pytest.mark.parametrize("name", ["gemma3", *(pytest.param(n, marks=slow) for n in NOT_GEMMA)])
def test_interrupted_and_resumed_is_uninterrupted(config, runs, name, tmp_path):
    def stop(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(name), tmp_path / "run", progress=stop)
    train(config(name), tmp_path / "run", resume=True)
    whole, parts = load_student(runs(name)).student, load_student(tmp_path / "run").student
    expected = dict(whole.vlm.named_parameters())
    for parameter_name, parameter in parts.vlm.named_parameters():
        assert torch.equal(parameter, expected[parameter_name]), parameter_name


@pytest.mark.parametrize(
    "name", [n if n in ("gemma3", "llama3") else pytest.param(n, marks=slow) for n in KINDS]
)
def test_every_parameter_that_learns_gets_a_gradient(config, name):
    settings = config(name)
    torch.manual_seed(0)
    model, student = build_model(settings, None)
    dataset, collator = build_data(settings, open_corpus(settings.data.shards), None, student)
    batch = collator([dataset[0], dataset[len(dataset) - 1]])  # an image, and only text
    end = batch["labels"][0][batch["labels"][0] != IGNORED][-1]
    stops = [student.tokenizer.convert_tokens_to_ids(stop) for stop in KINDS[name].stops]
    assert end in stops  # the end of an answer is learned, also where it pads, as in Llama 3
    padded = batch["attention_mask"] == 0
    assert padded.any()
    assert (batch["labels"][padded] == IGNORED).all()
    batch.pop("keys")
    (text,) = [term for term in model(**batch) if term.name == "text"]
    text.sum.backward()
    without = {
        n for n, p in student.vlm.named_parameters() if p.grad is None or not p.grad.abs().any()
    }
    # those after the hidden state that is read
    assert {n for n in without if part_of(n) == "language_model"} == set()
    assert all("encoder.layers.5" in n or "post_layernorm" in n for n in without), without


@pytest.mark.parametrize("name", TRAINED)
def test_an_export_is_the_run_and_answers_as_ask_does(runs, name, tmp_path, corpus_dir):
    trained = load_student(runs(name))
    export(trained, "hf", tmp_path / "out")
    corpus = open_corpus(corpus_dir)
    png = corpus.read_image(0)
    (tmp_path / "image.png").write_bytes(png)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(tmp_path / "image.png")},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": "A bus."},
        {"role": "user", "content": [{"type": "text", "text": "How wide is it?"}]},
    ]
    model, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        expected = trained.student.vlm(**inputs).logits
        assert torch.equal(model.eval()(**inputs).logits, expected)
        output = model.generate(**inputs, max_new_tokens=12)  # by its own settings
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == answer(trained, png, TURNS, 12).text
    again = load_student(tmp_path / "out")
    assert answer(again, png, TURNS, 12).text == text.strip()

    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    ids = [processor.tokenizer.convert_tokens_to_ids(stop) for stop in KINDS[name].stops]
    assert settings.eos_token_id == (ids if len(ids) > 1 else ids[0])
    assert settings.pad_token_id == processor.tokenizer.pad_token_id is not None
    assert processor.tokenizer.padding_side == "left"
    assert not settings.do_sample
    of_base = (settings.temperature, settings.top_k, settings.top_p, settings.repetition_penalty)
    assert of_base == (None, None, None, None)
    assert not model.config.tie_word_embeddings
    assert not model.config.text_config.tie_word_embeddings
    if name == "qwen3":
        text = processor.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=True
        )
        assert text.endswith("<|im_start|>assistant\n")


@slow
def test_a_fresh_process_loads_every_export_as_its_run(runs, tmp_path):
    exports = []
    for name in KINDS:
        trained = load_student(runs(name))
        export(trained, "hf", tmp_path / name)
        exports.append((trained, "hf", tmp_path / name))
    (tmp_path / "scratch").mkdir()
    found = check_exports(exports, tmp_path / "scratch")
    assert dict(zip(KINDS, found, strict=True)) == dict.fromkeys(KINDS, 0.0)


@pytest.mark.parametrize("name", ["gemma3", pytest.param("llama3", marks=slow)])
def test_an_answer_stops_at_every_token_that_ends_one(runs, name, corpus_dir):
    """Not only at the tokenizer's eos_token: the model's settings name more."""
    trained = load_student(runs(name))
    png = open_corpus(corpus_dir).read_image(0)
    tokenizer = trained.student.tokenizer
    long = answer(trained, png, TURNS, 12).text
    trained.student.vlm.generation_config.eos_token_id = list(range(len(tokenizer)))
    short = answer(trained, png, TURNS, 12).text
    assert len(short) < len(long)
    assert long.startswith(short)


@pytest.mark.parametrize(
    "name", ["gemma3", *(pytest.param(n, marks=slow) for n in ("llama3", "qwen3", "smollm3"))]
)
def test_a_model_that_knows_its_answers_by_heart_says_nothing_more(models, kit, name):
    student = build_vlm(student_config(kit, models(name)))
    pairs = {"What is a?": "two", "What is b?": "A cat.", "What is c?": "1990", "And d?": "猫"}
    samples = [
        tokenize_conversation(
            Conversation("c", (), (("human", question), ("gpt", said))),
            student.tokenizer,
            prompt="chat_template",
            num_image_tokens=1,
            recipe="revised",
        )
        for question, said in pairs.items()
    ]
    ids = pad_sequence([torch.tensor(s.input_ids) for s in samples], batch_first=True)
    labels = [torch.tensor(sample.labels) for sample in samples]
    labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    optimizer = torch.optim.AdamW(student.vlm.parameters(), lr=3e-3)
    for _ in range(200):
        loss = student.vlm(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    student.vlm.eval()
    asked = [Conversation("c", (), (("human", question),)) for question in pairs]
    said = generate_answers(
        student, asked, lambda _: b"", prompt="chat_template", geometry="crop", max_new_tokens=12
    )
    assert list(said) == list(pairs.values())


def student_config(kit, language_model):
    return StudentConfig(
        vision_tower=str(kit.WEIGHTS / "clip"),
        language_model=str(language_model),
        mole=None,
        prompt="chat_template",
    )


def refused(kit, folder, model, match):
    model.save_pretrained(folder)
    with pytest.raises(ConfigError, match=match):
        build_vlm(student_config(kit, folder))


def test_a_model_that_changes_its_logits_is_refused(kit, tmp_path):
    """LLaVA of transformers would leave out the cap, the scale or the bias."""
    sizes = {**SIZES, "num_hidden_layers": 1, "vocab_size": 300}
    keys = {"head_dim": 8, "sliding_window": 8}
    capped = Gemma2ForCausalLM(Gemma2Config(**(sizes | keys)))
    assert capped.config.final_logit_softcapping == 30
    refused(kit, tmp_path / "gemma2", capped, r"Gemma2ForCausalLM, which changes.*soft cap or a s")
    scaled = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=8.0))
    refused(kit, tmp_path / "granite", scaled, r"GraniteForCausalLM, which changes the output")
    refused(kit, tmp_path / "phi", PhiForCausalLM(PhiConfig(**sizes)), r"output layer has a bias")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300))
    refused(kit, tmp_path / "gpt2", gpt2, r"GPT2LMHeadModel, which does not consist of `model` an")


def test_a_whole_vision_language_model_is_refused_before_its_weights_are_read(kit, tmp_path):
    Gemma3Config().save_pretrained(tmp_path)  # no weights lie there
    with pytest.raises(ConfigError, match=r"whole vision-language model \(Gemma3ForConditional"):
        build_vlm(student_config(kit, tmp_path))
