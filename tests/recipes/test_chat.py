"""recipes/chat.py and recipes/generate.py from end to end, with a model small enough to tune in seconds."""

import contextlib
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, pipeline

import lemur_fast as lf
from lemur_fast.data.chat.chatml import DEFAULT_SYSTEM, ChatEncoder
from lemur_fast.data.chat.conversation import Message
from lemur_fast.data.store import TokenStore
from lemur_fast.data.tokenizer import load_tokenizer
from lemur_fast.training import loop
from lemur_fast.training.fit import fit
from lemur_fast.training.flops import model_flops
from lemur_fast.training.interruption import Interruption
from lemur_fast.training.saving import save_model
from tests.recipes.conftest import RECIPES, RUN_FILES, unless_given

SETTINGS = ["--seq-len", "128", "--batch-tokens", "256", "--eval-tokens", "512", "--warmup-steps", "2", "--lr", "1e-2"]
SETTINGS += ["--sample-tokens", "4", "--dtype", "float32", "--spike", "0", "--checkpoint-every", "0"]
COLOURS = ["red", "green", "blue", "white", "black"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaMA such as pretraining leaves it, with 24 rows more than its tokenizer has tokens, as Lemur's."""
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32024, num_key_value_heads=1, max_position_embeddings=128, **shape)
    weights = LlamaForCausalLM(config).state_dict()
    save_model(folder, config, weights, load_tokenizer(), GenerationConfig(bos_token_id=1, eos_token_id=2))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two files of conversations: questions with one answer, and pairs of them."""
    folder = tmp_path_factory.mktemp("sources")
    pairs = [(f"Colour {n}?", COLOURS[n % 5]) for n in range(60)]
    evol = [{"instruction": question, "output": answer} for question, answer in pairs]
    (folder / "evol.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evol))
    turns = [{"from": ("human", "gpt")[side], "value": pair[side]} for pair in pairs for side in (0, 1)]
    talks = [{"conversations": turns[start : start + 6]} for start in range(0, 114, 2)]
    (folder / "talks.json").write_text(json.dumps(talks))
    return ["--sources", f"evol:{folder / 'evol.jsonl'}", f"sharegpt:{folder / 'talks.json'}"]


def run(chat, *arguments):
    with Interruption() as interruption:
        given = [str(argument) for argument in arguments]
        return chat.chat(chat.parse([*unless_given(SETTINGS, given), *given]), interruption)


def weights_of(folder):
    return load_file(folder / "model" / "model.safetensors")


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.fixture(scope="module")
def tuned(chat, base, sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("chat") / "run"
    assert run(chat, "--model", base, *sources, "--out", out, "--steps", 8) == 0
    return out


@pytest.fixture(scope="module")
def adapted(chat, base, sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    assert run(chat, "--model", base, *sources, "--out", out, "--steps", 6, "--lora-rank", 4) == 0
    return out


def test_a_run_leaves_everything_it_promises(tuned):
    names = {path.name for path in tuned.iterdir()}
    assert names == RUN_FILES
    record = json.loads((tuned / "run.json").read_text())
    assert (record["outcome"], record["steps_done"]) == ("finished", 8)
    assert "--- Hi, how are you?" in (tuned / "samples.txt").read_text()
    assert losses(tuned)[-1] < losses(tuned)[0] - 1


def test_the_model_is_lemurs(tuned):
    model = AutoModelForCausalLM.from_pretrained(tuned / "model")
    assert model.config.vocab_size == model.model.embed_tokens.weight.shape[0] == 32005
    assert model.lm_head.weight.shape[0] == 32005
    assert model.generation_config.eos_token_id == [2, 32002]
    assert model.generation_config.pad_token_id == 32000
    assert (model.generation_config.temperature, model.generation_config.top_p) == (0.6, 0.9)
    tokenizer = AutoTokenizer.from_pretrained(tuned / "model")
    output = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hello"}],
        **{"return_dict": True, "return_assistant_tokens_mask": True},
    )
    assert tokenizer.convert_ids_to_tokens(output["input_ids"])[-5:] == ["<0x0A>", "hello", "<|im_end|>", "▁", "<0x0A>"]
    assert output["assistant_masks"][-5:] == [0, 1, 1, 1, 1]


def test_servers_find_what_they_look_for(tuned):
    """In the files themselves, as docs/recipes.md names them: vLLM does not ask this project's code."""
    model = tuned / "model"
    names = {*("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"), "tokenizer.json"}
    assert {path.name for path in model.iterdir()} == names | {"tokenizer_config.json"}
    config, generation, tokenizer = (
        json.loads((model / name).read_text()) for name in ("config.json", "generation_config.json", "tokenizer.json")
    )
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == 32005
    assert (generation["eos_token_id"], generation["temperature"], generation["top_p"]) == ([2, 32002], 0.6, 0.9)
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    assert (added["<|im_end|>"]["id"], added["<|im_end|>"]["special"]) == (32002, True)  # so it is never shown
    template = (model / "chat_template.jinja").read_text()
    assert "<|im_start|>assistant" in template
    assert template == AutoTokenizer.from_pretrained(model).chat_template
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (model / name).read_text()  # nothing that would ask for trust_remote_code


def test_tokens_start_at_the_mean_of_the_old_rows(chat, base, sources, tmp_path):
    """A step of learning rate nearly 0 leaves what the run started from."""
    out = tmp_path / "run"
    assert run(chat, "--model", base, *sources, "--out", out, "--steps", 1, "--lr", "1e-12") == 0
    before, after = load_file(base / "model.safetensors"), weights_of(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(after[name][:32000], before[name][:32000])
        torch.testing.assert_close(after[name][32000:], before[name][:32000].mean(0).expand(5, -1))


def test_the_share_of_every_source_is_as_asked(chat, base, sources, tmp_path):
    out = tmp_path / "run"
    mixture = ["--mixture", "evol", "3", "sharegpt", "1"]
    assert run(chat, "--model", base, *sources, "--out", out, "--steps", 10, *mixture) == 0
    tokens = json.loads((out / "run.json").read_text())["tokens"]
    assert tokens["evol"] / tokens["sharegpt"] == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "4"]])
def test_a_resumed_run_is_the_run_that_never_stopped(chat, base, sources, tuned, adapted, tmp_path, lora):
    """Stopped after 4 steps, gone on from the checkpoint: the same losses and weights, bit for bit."""
    out, whole, steps = tmp_path / "run", adapted if lora else tuned, 6 if lora else 8
    given = ["--model", base, *sources, "--out", out, *lora]
    real = chat.fit

    def stopping(*arguments, **options):
        options["telemetry"].warn = lambda message: options["interruption"].__setattr__(
            "signum", 15 if options["progress"].done == 4 else None
        )
        real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "fit", stopping)
        assert run(chat, *given, "--steps", steps) == 143
    assert len(losses(out)) == 4
    assert run(chat, *given, "--steps", steps, "--resume", "auto") == 0
    assert losses(out) == losses(whole)
    assert all(torch.equal(value, weights_of(whole)[name]) for name, value in weights_of(out).items())
    assert run(chat, *given, "--steps", steps + 1, "--resume", "auto") == 2


def begun(chat, base, sources, out):
    """A run that was stopped before its third step: its folder holds tokens and a checkpoint."""

    def stopping(*arguments, **options):
        options["telemetry"].warn = lambda message: options["interruption"].__setattr__("signum", 15)
        fit(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "fit", stopping)
        assert run(chat, "--model", base, *sources, "--out", out, "--steps", 2) == 143


def test_a_run_is_resumed_with_its_sources_alone(chat, base, sources, tmp_path, capsys):
    """Other sources are refused by name, whatever they hold, and change nothing; those of the run are read no more."""
    out, (flag, evol, talks) = tmp_path / "run", sources
    begun(chat, base, sources, out)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(evol.removeprefix("evol:")).read_bytes())
    others = [[], [flag, evol], [flag, evol, talks, f"more={evol}"], [flag, f"evol:{copy}", talks]]
    others += [[flag, f"renamed={evol}", talks]]
    given = ["--model", base, "--out", out, "--steps", 2, "--resume", "auto"]
    capsys.readouterr()
    for other in others:
        for changed in ([], ["--resume-changed"]):
            assert run(chat, *given, *other, *changed) == 2
            error = capsys.readouterr().err
            assert f"--sources: {out / 'data'} was made of others (evol, sharegpt); resume with those" in error
    assert before == {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "build_chat_store", lambda *given, **options: pytest.fail("tokenized again"))
        assert run(chat, *given, *sources) == 0
    assert len(losses(out)) == 2


def test_a_run_is_not_resumed_on_conversations_prepared_otherwise(chat, base, sources, tuned, tmp_path, capsys):
    out = tmp_path / "run"
    begun(chat, base, sources, out)
    given = ["--model", base, "--out", out, "--steps", 2, "--resume", "auto"]
    for name, value, was in (
        ("near-duplicates", "0.5", "0.7"),
        ("overlong", "drop", "split"),
        ("held-out", "0.1", "0.05"),
    ):
        assert run(chat, *given, *sources, f"--{name}", value) == 2
        assert (
            f"--{name} {value}: the conversations in {out / 'data'} were prepared with {was}" in capsys.readouterr().err
        )
    other = tmp_path / "other"
    assert run(chat, "--model", base, *sources[:2], "--out", other, "--steps", 1) == 0
    assert run(chat, *given, "--data", other / "data") == 2
    assert "--resume: this is not the run that was stopped: --documents was " in capsys.readouterr().err
    assert run(chat, *given, "--data", tuned / "data") == 0  # the same, prepared by another run


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "4"]])
def test_two_processes_are_one(base, sources, tuned, adapted, tmp_path, lora):
    whole = adapted if lora else tuned
    steps = "6" if lora else "8"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(RECIPES / "chat.py"), *SETTINGS, "--model", str(base), *sources, "--steps", steps, *lora]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES.parent)}
    extra = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] += f"{os.pathsep}{extra}" if extra else ""
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-4)
    for name, value in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(value, weights_of(whole)[name], rtol=1e-3, atol=1e-4)


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def test_the_merged_model_gives_what_the_adapted_one_does(base, adapted):
    merged = AutoModelForCausalLM.from_pretrained(adapted / "model").eval()
    stock = LlamaForCausalLM.from_pretrained(base)
    stock.resize_token_embeddings(32005, mean_resizing=False)
    adapter = PeftModel.from_pretrained(stock, adapted / "adapter").eval()
    ids = torch.randint(0, 32005, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = merged(input_ids=ids).logits, adapter(input_ids=ids).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        with adapter.disable_adapter():
            assert (adapter(input_ids=ids).logits - theirs).abs().max() > 0.05  # the adapters do something


def test_lora_trains_the_adapters_and_the_rows_of_new_tokens(base, adapted):
    record = json.loads((adapted / "run.json").read_text())
    assert record["trainable_parameters"] < record["parameters"]
    before, after = load_file(base / "model.safetensors"), weights_of(adapted)
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    head = after["lm_head.weight"]
    assert (head[32002] - head[32001]).abs().max() > 1e-3  # <|im_end|> can be told from <|im_start|>
    assert losses(adapted)[-1] < losses(adapted)[0] - 0.1


@pytest.mark.parametrize("rank", [0, 4])
def test_flops_are_those_of_what_is_trained(chat, base, sources, tmp_path, monkeypatch, rank):
    asked = []
    monkeypatch.setattr(loop, "model_flops", lambda *given: asked.append(given[3]) or model_flops(*given))
    given = ["--model", base, *sources, "--out", tmp_path / "run", "--steps", 1, "--lora-rank", rank]
    assert run(chat, *given) == 0
    assert [lora and lora.r for lora in asked] == [rank or None]


def test_lora_on_tied_embeddings_without_chatml_is_refused(chat):
    with pytest.raises(ValueError, match="embedding and output layer are one"):
        chat.lora_config(4, 8, True, True)


def test_adapters_are_not_resumed_on_other_weights(chat, base, sources, tmp_path, capsys):
    model = shutil.copytree(base, tmp_path / "base")
    given = ["--model", model, *sources, "--out", tmp_path / "run", "--lora-rank", 2, "--steps", 1]
    assert run(chat, *given) == 0
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert run(chat, *given, "--resume", "auto") == 2
    assert "--resume: this is not the run that was stopped: --weights was " in capsys.readouterr().err
    (state,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    saved = json.loads(state.read_text())
    del saved["settings"]["weights"]  # as runs were saved before
    state.write_text(json.dumps(saved))
    assert run(chat, *given, "--resume", "auto") == 0


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "no tokenizer in nowhere"),
        (["--sources", "x:y"], r"takes [NAME=]FORMAT:WHERE"),
        (["--sources", "evol:no.jsonl"], "no.jsonl does not exist"),
        (["--mixture", "evol", "-1"], "--mixture: weights must not be negative"),
        (["--mixture", "poems", "1"], "the mixture asks for 'poems'"),
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--epochs", "inf"], "--epochs must be finite"),
        (["--batch-tokens", "100"], "--batch-tokens must be a multiple of --seq-len"),
        (["--seq-len", "256", "--batch-tokens", "256"], "--seq-len 256 is longer than the model allows: 128"),
        (["--overwrite"], "--overwrite needs --out"),
        (["--data", "d"], "--sources and --data: give one"),
    ],
)
def test_what_cannot_work_is_refused(chat, base, sources, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [*unless_given(["--model", base], arguments), *([] if "--sources" in arguments else sources)]
    assert run(chat, *given, *arguments) == 2
    assert not (tmp_path / "runs" / "chat-tiny").exists()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("where", ["bad.jsonl.gz", "hf://no/such"])
def test_conversations_that_cannot_be_read_are_refused(chat, base, tmp_path, monkeypatch, capsys, where):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    Path("bad.jsonl.gz").write_bytes(gzip.compress(b"{}" * 9)[:-9])
    assert run(chat, "--model", base, "--sources", f"messages:{where}") == 2
    assert f"source {where} cannot be read to its end: " in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_there_must_be_a_model_to_tune(chat, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(chat, "--preset", "tiny", *sources) == 2
    assert "run recipes/pretrain.py first" in capsys.readouterr().err


def test_what_pretraining_saved_last_is_tuned_by_default(chat, base, sources, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pretrain-tiny").mkdir()
    (tmp_path / "runs" / "pretrain-tiny" / "model").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    assert chat.parse([]).preset == "tiny"
    assert str(chat.base_folder(chat.parse([]))) == "runs/pretrain-tiny/model"


def test_in_a_fresh_clone_smollm2_is_tuned(chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "model_folder", lambda model, preset: Path(f"fetched/{preset}"))
    assert chat.base_folder(chat.parse([])) == Path("fetched/smollm2-135m")
    assert chat.parse(["--model", "mine"]).preset == "tiny"
    assert chat.parse(["--preset", "tiny"]).preset == "tiny"


def test_epochs_decide_the_steps(chat, base, sources, tuned, tmp_path):
    data = TokenStore(tuned / "data")
    out = tmp_path / "run"
    assert run(chat, "--model", base, "--data", tuned / "data", "--out", out, "--epochs", 0.5) == 0
    steps = json.loads((out / "run.json").read_text())["steps_done"]
    assert steps == -(-int(data.train.lengths.sum()) // 512)


def test_sources_given_twice_are_refused(chat, capsys):
    with pytest.raises(SystemExit) as leaving:
        chat.parse(["--sources", "evol:a.jsonl", "--sources", "evol:b.jsonl"])
    assert leaving.value.code == 2
    assert "Where it takes several values, they follow it: --sources A B" in capsys.readouterr().err


def test_show_example_prints_and_leaves(chat, base, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(chat, "--model", base, *sources, "--show-example") == 0
    printed = capsys.readouterr().out
    assert "evol/0: " in printed
    assert "<|im_start|>assistant\n⟦red<|im_end|>" in printed
    assert printed.count("⟦like this⟧") == 2
    assert list(tmp_path.iterdir()) == []


# ---- talking ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def memorized(tuned, tmp_path):
    """The tuned folder with an output layer that answers "green" and then <|im_end|>, whatever it is asked."""
    model = LlamaForCausalLM.from_pretrained(tuned / "model")
    tokenizer = AutoTokenizer.from_pretrained(tuned / "model")
    (green,) = tokenizer("\ngreen", add_special_tokens=False)["input_ids"][2:]
    line_end, end = 13, 32002
    with torch.no_grad():  # the stream is the embedding of the last token alone
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_()
        head.zero_()
        head[green], head[end] = embedding[line_end] * 10, embedding[green] * 10
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model.generation_config.save_pretrained(tmp_path / "model")
    return tmp_path


def test_one_answer_stops_at_the_end_of_the_turn(generate, memorized, capsys):
    assert generate.main([str(memorized), "--prompt", "Colour?", "--temperature", "0", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == "green\n"  # streamed; nothing after <|im_end|>, and no control token


def test_the_folder_works_in_a_stock_pipeline(memorized):
    """It takes messages, stops at <|im_end|>, and gives the answer without control tokens."""
    answer = pipeline("text-generation", model=str(memorized / "model"))
    said = [{"role": "user", "content": "Colour 3?"}]
    (output,) = answer(said, max_new_tokens=16)
    assert output["generated_text"] == [*said, {"role": "assistant", "content": "green"}]


@pytest.fixture
def server(memorized):
    """`transformers serve` on the folder, as documented, on this machine only; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(memorized / "model")]
    log = memorized / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            **{"stdout": output, "stderr": output, "env": {**os.environ, "HF_HUB_OFFLINE": "1"}},
        )
    try:
        begun = time.monotonic()
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < begun + 300, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_transformers_serves_the_folder_to_openai_s_client(server, memorized):
    """The answer is "green" and <|im_end|>, at which it stops: two tokens of the sixteen that it may have."""
    folder = str(memorized / "model")
    client = OpenAI(base_url=server, api_key="none")
    ask = {"model": folder, "messages": [{"role": "user", "content": "Colour?"}], "max_tokens": 16}
    whole = client.chat.completions.create(**ask)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "green", "stop")
    assert whole.usage.completion_tokens == 2
    tokenizer = load_tokenizer(memorized / "model")
    conversation = [Message("system", DEFAULT_SYSTEM), Message("user", "Colour?")]
    assert whole.usage.prompt_tokens == len(ChatEncoder(tokenizer).prompt(conversation))
    *parts, last = client.chat.completions.create(**ask, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "green"
    assert last.choices[0].finish_reason == "stop"


def test_a_conversation_remembers_and_forgets(generate, memorized, monkeypatch, capsys):
    talk = generate.Talk(generate.Generate(run=memorized / "model", temperature=0, dtype="float32", max_new_tokens=8))
    lines = iter(["One?", "", "Two?", "/new", "Three? <|im_end|>", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    seen = []
    write = talk.model.generate
    monkeypatch.setattr(talk.model, "generate", lambda **given: seen.append(given["input_ids"][0]) or write(**given))
    generate.converse(talk)
    assert capsys.readouterr().out.split() == ["green"] * 3
    texts = [talk.tokenizer.decode(ids) for ids in seen]
    assert ["One?" in text for text in texts] == [True, True, False]
    assert "green<|im_end|>" in texts[1]
    assert [int((ids == 32001).sum()) for ids in seen] == [3, 5, 3]  # nothing typed opens or ends a turn
    assert [int((ids == 32002).sum()) for ids in seen] == [2, 4, 2]


def test_what_is_said_first_is_forgotten_when_there_is_no_room(generate, memorized, capsys):
    talk = generate.Talk(generate.Generate(run=memorized, temperature=0, dtype="float32", max_new_tokens=8))
    talk.answer("first " * 40)
    talk.answer("second " * 40)
    assert "first question and answer are forgotten" in capsys.readouterr().out
    assert [message.content.strip()[:6] for message in talk.said[1:]] == ["second", "green"]
    with pytest.raises(ValueError, match=r"the question has .* tokens with its system message; the model reads 128"):
        talk.answer("third " * 200)
    assert len(talk.said) == 3


def test_decoding_with_a_cache_keeps_the_fused_ops(generate, memorized):
    talk = generate.Talk(generate.Generate(run=memorized, temperature=0, dtype="float32", max_new_tokens=2))

    seen = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen[str(function)] += 1
            return function(*args, **(kwargs or {}))

    with Count():
        talk.answer("x")
    layers, tokens = 2, 2
    fused = {name.split(".")[1]: n for name, n in seen.items() if name.startswith("lemur_fast.")}
    assert fused["rotary"] == fused["swiglu"] == layers * tokens
    assert sum(n for name, n in fused.items() if "rms_norm" in name) == (2 * layers + 1) * tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no model"),
        ([], "no run of recipes/chat.py in runs/"),
        (["--prompt", " "], "--prompt must not be empty"),
        (["--temperature", "-1"], "--temperature must not be negative"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be above 0"),
        (["--top-p", "2"], "--top-p must be in (0, 1], got 2.0"),
        (["--temperature", "inf"], "--temperature must not be negative, and finite, got inf"),
        (["--seed", str(2**63)], "--seed must be in [0, 2^63), got 9223372036854775808"),
    ],
)
def test_talking_to_nothing_is_refused(generate, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert generate.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_talked_to_is_refused(generate, memorized, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert generate.main([str(memorized), "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no CUDA GPU here" in capsys.readouterr().err
    assert generate.main([str(memorized), "--prompt", os.fsdecode(b"caf\xe9")]) == 2
    assert "generate: 'utf-8' codec can't decode byte 0xe9" in capsys.readouterr().err
    weights = memorized / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert generate.main([str(memorized), "--prompt", "x"]) == 2
    assert f"{weights} is damaged: " in capsys.readouterr().err


def test_a_base_model_is_no_chat_model(generate, base, capsys):
    assert generate.main([str(base), "--prompt", "x"]) == 2
    assert "is not a chat model" in capsys.readouterr().err


def test_an_accelerated_model_answers_as_stock_does(tuned):
    tokenizer = AutoTokenizer.from_pretrained(tuned / "model")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Colour 3?"}],
        **{"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True},
    )
    answers = []
    for accelerated in (False, True):
        model = LlamaForCausalLM.from_pretrained(tuned / "model").eval()
        if accelerated:
            lf.accelerate(model)
        answers.append(model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist())
    assert answers[0] == answers[1]
