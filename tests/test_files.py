"""Checkpoint files: what is written comes back bit for bit, and nothing else is believed."""

import contextlib
import importlib.metadata
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import CRNN, Tied, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import hyperize.files as files
from hyperize import (
    ConfigError,
    FileError,
    HyperizeError,
    ModelError,
    dense_state_dict,
    from_pretrained,
    hyperize,
    load,
    load_timm,
    save,
    save_pretrained,
    to_dense,
)

MODELS = ["resnet18", "tf_efficientnet_b0", "nf_resnet26", "mobilenetv3_small_050", "convnext_atto"]
SPATIAL = ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"]
"""Models with buffers outside the state dict, or positions that depend on the image's size."""


def small(name, **options):
    return randomise(timm.create_model(name, **options), 0).eval()


def images(size=64):
    return torch.randn(2, 3, size, size)


@torch.no_grad()
def same(one, other, x):
    return torch.equal(one(x), other(x))


def tensors_of(hyper):
    return {name: tensor.clone() for name, tensor in hyper.state_dict().items()}


def header_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return files.parsed_header(file.metadata()["hyperize"])


def write(path, header, tensors):
    """A file with the checksum that belongs to what is in it."""
    signed = header | {"sha256": files._digest(header, tensors)}
    save_file(tensors, path, {"hyperize": json.dumps(signed)})


def resigned(path, source, **changes):
    """Writes what `source` holds with another header."""
    write(path, header_of(source) | changes, load_file(source))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file of a small timm model, with what it was made of."""
    path = tmp_path_factory.mktemp("good") / "hyper.safetensors"
    hyper = hyperize(small("test_resnet", num_classes=5), compression=2, seed=0)
    save(hyper, path)
    return path, hyper


@pytest.fixture(scope="module", params=[None, "int8", "int4"])
def any_file(request, good, tmp_path_factory):
    """Such a file, also in bits, with the model that is loaded from it."""
    path = tmp_path_factory.mktemp("any") / "hyper.safetensors"
    save(good[1], path, dtype=request.param)
    return path, load_timm(path)


# What is written comes back


@pytest.mark.parametrize("name", MODELS)
def test_files_round_trip(name, tmp_path):
    model = small(name)
    hyper = hyperize(model, seed=3)
    path = tmp_path / "hyper.safetensors"
    written = save(hyper, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert written.bytes == path.stat().st_size
    assert written.recorded == name
    x = images()
    with torch.device("meta"):
        architecture = timm.create_model(name).eval()
    for again in (load(timm.create_model(name).eval(), path), load(architecture, path)):
        assert same(again, hyper, x)
        assert again.hypernet.plan == hyper.hypernet.plan
        assert not any(p.is_meta for p in again.parameters())
    again = load_timm(path)
    assert same(again, hyper, x)
    assert again.state_dict().keys() == hyper.state_dict().keys()
    assert not again.training
    assert path.stat().st_size < 0.7 * sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize("name", SPATIAL)
def test_models_with_buffers_outside_the_state_dict_come_back(name, tmp_path):
    hyper = hyperize(small(name, drop_path_rate=0.1), targets=("conv2d", "linear"), compression=5)
    save(hyper, tmp_path / "f")
    again = load_timm(tmp_path / "f")
    assert same(again, hyper, images(224))
    assert repr(again) == repr(hyper)  # drop rates too


def test_a_model_on_meta_without_its_buffers_is_refused(tmp_path):
    hyper = hyperize(small("swin_tiny_patch4_window7_224"), compression=2)
    save(hyper, tmp_path / "f")
    with torch.device("meta"):
        hollow = timm.create_model("swin_tiny_patch4_window7_224")
    lacking = any(m._non_persistent_buffers_set for m in hollow.modules())
    if not lacking:
        pytest.skip("this version of timm keeps all buffers of it in the state dict")
    with pytest.raises(FileError, match="on the CPU"):
        load(hollow, tmp_path / "f")


def test_a_tenth_of_resnet18_is_an_eighth_of_the_file(tmp_path):
    model = small("resnet18")
    save_file(model.state_dict(), tmp_path / "dense")
    most = (tmp_path / "dense").stat().st_size / 8
    both = hyperize(model, compression=10, targets=("conv2d", "linear"))
    assert save(both, tmp_path / "hyper").bytes <= most
    assert same(load_timm(tmp_path / "hyper"), both, images())
    # Of the convolutions alone a tenth is 1/7.1, as the classifier stays; rounded it is 1/13.9
    convolutions = hyperize(model, compression=10)
    assert save(convolutions, tmp_path / "half", dtype=torch.float16).bytes <= most


@pytest.mark.parametrize("lstm", ["static", "dynamic"])
def test_recurrent_models_round_trip(lstm, tmp_path):
    hyper = hyperize(CRNN(), compression=3, lstm=lstm).eval()
    written = save(hyper, tmp_path / "f")
    assert written.recorded is None
    assert "not a model of timm" in str(written)
    x = torch.randn(2, 1, 16, 32)
    with torch.device("meta"):
        hollow = CRNN().eval()
    for model in (CRNN().eval(), hollow):
        assert same(load(model, tmp_path / "f"), hyper, x)
    with pytest.raises(FileError, match="load\\(model, path\\)"):
        load_timm(tmp_path / "f")


def test_a_model_that_is_itself_a_dynamic_layer_round_trips(tmp_path):
    hyper = hyperize(nn.LSTM(8, 12), lstm="dynamic")
    save(hyper, tmp_path / "f")
    x = torch.randn(5, 2, 8)
    assert torch.equal(load(nn.LSTM(8, 12), tmp_path / "f")(x)[0], hyper(x)[0])


def test_tied_parameters_stay_tied(tmp_path):
    hyper = hyperize(Tied(), compression=2).eval()
    save(hyper, tmp_path / "f")
    again = load(Tied().eval(), tmp_path / "f")
    assert again.decoder.weight is again.encoder.weight
    assert same(again, hyper, images(16))


def test_the_model_given_is_not_changed_and_nothing_is_drawn(good):
    path, hyper = good
    model = small("test_resnet", num_classes=5)
    before, state = tensors_of(model), torch.get_rng_state()
    again = load(model, path)
    load_timm(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not {id(p) for p in again.parameters()} & {id(p) for p in model.parameters()}
    for parameter in hyper.parameters():
        assert parameter.grad is None


def test_files_are_the_same_for_the_same_model(good, tmp_path):
    path, hyper = good
    save(hyper, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == path.read_bytes()


def test_frozen_parameters_follow_the_model_given(good):
    path, _ = good
    model = small("test_resnet", num_classes=5)
    model.fc.requires_grad_(False)
    assert not load(model, path).fc.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_come_back(dtype, tmp_path):
    hyper = hyperize(small("test_resnet").to(dtype), compression=2)
    save(hyper, tmp_path / "f")
    again = load(timm.create_model("test_resnet"), tmp_path / "f")
    ours, theirs = hyper.state_dict(), again.state_dict()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name


# Rounding for the file


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_rounding_halves_the_file_and_its_error_is_told(dtype, unit, tmp_path):
    model = small("resnet18")
    hyper = hyperize(model)
    exact, rounded = save(hyper, tmp_path / "a"), save(hyper, tmp_path / "b", dtype=dtype)
    assert rounded.bytes < 0.52 * exact.bytes
    again = load_timm(tmp_path / "b")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    ours, theirs = dense_state_dict(hyper), dense_state_dict(again)
    for name, error in rounded.errors.items():
        found = (ours[name] - theirs[name]).norm() / ours[name].norm()
        # Generated by float32 products both times
        assert error == pytest.approx(found.item(), rel=1e-3, abs=1e-7)
    generated = [planned.site.name for planned in hyper.hypernet.plan.sites]
    assert set(generated) <= set(rounded.errors)
    assert "fc.weight" in rounded.errors
    assert not any("hypernet" in name or "embedding" in name for name in rounded.errors)
    # Each product has two rounded factors, so at most about two units in the last place
    assert 0 < max(rounded.errors[name] for name in generated) < 2 * unit
    assert str(dtype).removeprefix("torch.") in str(rounded)
    for name, buffer in hyper.named_buffers():
        assert torch.equal(dict(again.named_buffers())[name], buffer), name
    assert exact.errors == {}


def test_what_rounding_cannot_hold_is_refused(tmp_path):
    hyper = hyperize(small("test_resnet"), compression=2)
    with torch.no_grad():
        hyper.fc.weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"fc\.weight.*bfloat16"):
        save(hyper, tmp_path / "f", dtype=torch.float16)
    for wrong in (torch.int8, torch.float8_e4m3fn, "float16"):
        with pytest.raises(ConfigError, match="dtype must be"):
            save(hyper, tmp_path / "f", dtype=wrong)
    assert not list(tmp_path.iterdir())
    save(hyper, tmp_path / "f", dtype=torch.bfloat16)


# Folders as on the Hub


@pytest.mark.parametrize(("name", "options"), [("resnet18", {"num_classes": 7, "in_chans": 1})])
def test_folders_round_trip(name, options, tmp_path):
    hyper = hyperize(small(name, **options))
    x = torch.randn(2, options["in_chans"], 64, 64)
    save_pretrained(hyper, tmp_path / "hyper")
    assert {p.name for p in (tmp_path / "hyper").iterdir()} == {
        *("config.json", "model.safetensors", "README.md")
    }
    config = json.loads((tmp_path / "hyper" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == (name, options["num_classes"])
    assert config["pretrained_cfg"]["mean"]
    again = from_pretrained(tmp_path / "hyper")
    assert same(again, hyper, x)
    assert tuple(again.pretrained_cfg["mean"]) == tuple(config["pretrained_cfg"]["mean"])
    assert same(from_pretrained(tmp_path / "hyper", small(name, **options)), hyper, x)
    card = (tmp_path / "hyper" / "README.md").read_text()
    assert card.startswith("---\ntags:\n- hyperize\n")
    assert f"{hyper.hypernet.plan.hyper_params:,}" in card


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_dense_folders_are_plain_timm(name, tmp_path):
    model = small(name, num_classes=7)
    hyper = hyperize(model, targets=("conv2d", "linear"), compression=4)
    x = images(224)
    save_pretrained(hyper, tmp_path / "dense", dense=True)
    timm.create_model(name, num_classes=7).load_state_dict(
        load_file(tmp_path / "dense" / "model.safetensors"), strict=True
    )
    plain = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    assert same(plain, hyper, x)


def test_dense_folders_need_no_hyperize(tmp_path):
    hyper = hyperize(small("test_resnet", num_classes=3), compression=2)
    save_pretrained(hyper, tmp_path / "dense", dense=True)
    x = images()
    torch.save((x, hyper(x).detach()), tmp_path / "expected.pt")
    code = """
        import sys, timm, torch
        torch.set_num_threads(int(sys.argv[1]))  # sums are split among threads
        x, y = torch.load("expected.pt")
        model = timm.create_model("local-dir:dense", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(model(x), y)
        assert "hyperize" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(torch.get_num_threads())]
    subprocess.run(command, cwd=tmp_path, check=True)


def test_folders_of_other_models(tmp_path):
    hyper = hyperize(CRNN(), compression=3).eval()
    save_pretrained(hyper, tmp_path / "f", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "f" / "config.json").read_text())["architecture"] == "CRNN"
    from_pretrained(tmp_path / "f", CRNN())
    with pytest.raises(FileError, match="names no timm model"):
        from_pretrained(tmp_path / "f")
    with pytest.raises(FileError, match="snapshot_download"):
        from_pretrained("timm/resnet18.a1_in1k")
    with pytest.raises(ModelError, match=r"timm\.create_model"):
        save_pretrained(hyper, tmp_path / "g", dense=True)
    assert not (tmp_path / "g").exists()
    (tmp_path / "f" / "config.json").write_text("{")
    from_pretrained(tmp_path / "f", CRNN())
    (tmp_path / "f" / "model.safetensors").unlink()
    with pytest.raises(FileError, match="cannot be read"):
        from_pretrained(tmp_path / "f", CRNN())


# What load_timm makes is the model that was saved, or is not made


def test_models_changed_after_timm_made_them_are_not_recorded(tmp_path):
    for change in (
        lambda m: setattr(m, "act1", nn.GELU()),
        lambda m: setattr(m.layer2[0].conv1, "stride", (1, 1)),
        lambda m: setattr(m, "fc", nn.Identity()),
    ):
        model = small("resnet18")
        change(model)
        written = save(hyperize(model), tmp_path / "f")
        assert written.recorded is None
        assert "makes other" in written.reason
        with pytest.raises(FileError, match="names no timm model"):
            load_timm(tmp_path / "f")
        load(model, tmp_path / "f")


def test_arguments_are_checked_when_saving(tmp_path):
    hyper = hyperize(small("resnet18"))
    with pytest.raises(ConfigError, match="do not make this model"):
        save(hyper, tmp_path / "f", timm_args={"num_classes": 3})
    with pytest.raises(ConfigError, match="not one that a file may give"):
        save(hyper, tmp_path / "f", timm_args={"checkpoint_path": "x.pt"})
    with pytest.raises(ConfigError, match="not a model of timm"):
        save(hyperize(CRNN(), compression=3), tmp_path / "f", timm_args={})
    assert not list(tmp_path.iterdir())


HOSTILE = [
    {"architecture": "hf-hub:someone/model"},
    {"architecture": "local-dir:/etc"},
    {"architecture": "../resnet18"},
    {"architecture": "no_such_model"},
    {"architecture": ["resnet18"]},
    {"architecture": None},
    {"model_args": {"checkpoint_path": "/tmp/x.pt"}},
    {"model_args": {"pretrained": True}},
    {"model_args": {"pretrained_cfg": {"url": "http://localhost/x"}}},
    {"model_args": {"cache_dir": "/tmp"}},
    {"model_args": {"layers": [10**9] * 4}},
    {"model_args": {"img_size": 10**12}},
    {"model_args": {"act_layer": "__import__('os')"}},
    {"model_args": {"in_chans": {"a": 1}}},
    {"model_args": []},
    {"model_args": {"num_classes": 10**15}},
    {"model_args": {"num_classes": "5"}},
    {"model_args": {"depth": 3}},
    {"pretrained_cfg": {"unknown": 1}},
    {"pretrained_cfg": None},
]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda c: json.dumps(c)[:50])
def test_files_cannot_make_timm_do_more(change, good, tmp_path, monkeypatch):
    path, _ = good

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    config = header_of(path)["timm"]
    resigned(tmp_path / "bad", path, timm=config | change)
    with pytest.raises(FileError):
        load_timm(tmp_path / "bad")


def test_sources_of_weights_in_a_file_are_ignored(good, tmp_path, monkeypatch):
    path, hyper = good
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("asked for the network"))
    config = header_of(path)["timm"]
    config["pretrained_cfg"] |= {"url": "http://localhost/x", "file": "/etc/passwd"}
    resigned(tmp_path / "f", path, timm=config)
    again = load_timm(tmp_path / "f")
    assert same(again, hyper, images())
    assert not {"url", "file", "hf_hub_id"} & again.pretrained_cfg.keys()


# Damaged, foreign and hostile files


def test_damaged_and_foreign_files_are_refused(good, tmp_path):
    path, _ = good
    model = small("test_resnet", num_classes=5)
    data, header, tensors = path.read_bytes(), header_of(path), load_file(path)
    bad = tmp_path / "bad"

    def refused(match, given=model, file=bad):
        with pytest.raises(FileError, match=match):
            load(given, file)

    bad.write_bytes(data[: len(data) // 2])
    refused("read")
    for junk in (b"", b"PK\x03\x04" + bytes(100), pickle.dumps({"a": 1}), b"\xff" * 64):
        bad.write_bytes(junk)
        refused("read")
    refused("read", file=tmp_path / "absent")
    refused("read", file=tmp_path)
    save_file(tensors, bad)
    refused("not one that")
    save_file(tensors, bad, {"hyperize": "[]"})
    refused("not one that")
    resigned(bad, path, format=99)
    refused("upgrade")
    signed = {"hyperize": json.dumps(header)}
    save_file(tensors | {"fc.weight": tensors["fc.weight"] + 1e-7}, bad, signed)
    refused("damaged")
    save_file(tensors, bad, {"hyperize": json.dumps(header | {"sha256": None})})
    refused("damaged")
    refused(r"fc\.bias has the shape", given=small("test_resnet", num_classes=6), file=path)
    refused("does not fit", given=small("resnet18"), file=path)
    refused("does not fit", given=nn.Linear(3, 3), file=path)
    for change, match in ((lambda t: t.pop("fc.bias"), "lacks"), (extra, "foreign")):
        changed = dict(tensors)
        change(changed)
        write(bad, header, changed)
        refused(match)
    with pytest.raises(ModelError):
        load("resnet18", path)


def extra(tensors):
    tensors["more"] = torch.zeros(1)


def test_every_flipped_bit_is_found_or_harmless(any_file, tmp_path):
    """Bits all over the file, and all of the first bytes of its header."""
    path, hyper = any_file
    data, bad = path.read_bytes(), tmp_path / "bad"
    length = int.from_bytes(data[:8], "little")
    step = max(1, len(data) // 300)
    refused = 0
    places = {*range(200), *range(8, 8 + length, 397), *range(0, len(data), step)}
    for at in sorted(places):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        bad.write_bytes(flipped)
        try:
            again = load_timm(bad)
        except FileError:
            refused += 1
        else:  # white space, or a key that nobody reads
            assert all(
                torch.equal(t, hyper.state_dict()[name]) for name, t in again.state_dict().items()
            )
            assert again.hypernet.plan == hyper.hypernet.plan
    assert refused > 0.95 * len(places)


MANY = settings(
    max_examples=500,  # of each file
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@MANY
@given(data=st.data())
def test_mutated_files_raise_nothing_else(data, any_file, tmp_path):
    """Bytes are replaced, cut out, doubled and put in at random."""
    path, _ = any_file
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    ends = st.one_of(st.integers(0, 16), st.integers(0, 8 + length), st.integers(0, len(content)))
    for _ in range(data.draw(st.integers(1, 4))):
        a, b = sorted(data.draw(st.tuples(ends, ends)))
        kind = data.draw(st.sampled_from(["replace", "cut", "double", "insert"]))
        if kind == "replace":
            noise = data.draw(st.binary(min_size=1, max_size=8))
            content[a : a + len(noise)] = noise
        elif kind == "cut":
            del content[a:b]
        elif kind == "double":
            content[a:a] = content[a : min(b, a + 1000)]
        else:
            content[a:a] = data.draw(st.binary(max_size=30))
    bad = tmp_path / "bad"
    bad.write_bytes(content)
    if content == path.read_bytes():
        return
    with contextlib.suppress(FileError):
        load_timm(bad)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**40, 2**62, float("inf"), float("nan"), 1e308]),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.lists(st.integers(0, 9), max_size=3),
)


def places(tree, at=()):
    """The paths of all nodes of a JSON tree."""
    yield at
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, child in items:
        yield from places(child, (*at, key))


@MANY
@given(data=st.data())
def test_hostile_headers_raise_nothing_else_and_take_no_memory(data, any_file, tmp_path):
    """Headers that lie, with a checksum that is right."""
    path, _ = any_file
    header, tensors = header_of(path), load_file(path)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from([p for p in places(header) if p]))
        node = header
        for key in at[:-1]:
            node = node[key]
        if data.draw(st.booleans()):
            node[at[-1]] = data.draw(LEAVES)
        else:
            del node[at[-1]]
    write(tmp_path / "bad", header, tensors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        again = load_timm(tmp_path / "bad")
    except FileError:
        pass
    else:  # what was changed is a remark, or the dtype that a parameter had
        if all(param.dtype == torch.float32 for param in again.parameters()):
            with torch.no_grad():
                assert again(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    # KiB; the file has 0.1 MB, and pages that Python keeps come and go
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_header_without_end_is_not_read(tmp_path):
    bad = tmp_path / "bad"
    with bad.open("wb") as file:
        file.write((2**27).to_bytes(8, "little"))
        file.truncate(2**28)  # a file with a hole, which takes no space
    with pytest.raises(FileError, match="header would have"):
        load(nn.Linear(3, 3), bad)
    deep = "[" * 100_000
    save_file({"a": torch.zeros(1)}, bad, {"hyperize": deep})
    with pytest.raises(FileError, match="not one that"):
        load(nn.Linear(3, 3), bad)


def test_loading_runs_no_pickle(good, monkeypatch):
    path, _ = good
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *a, **k: pytest.fail("pickle was used"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was used"))
    load_timm(path)


# Writing


def test_a_package_that_is_not_installed_can_save(tmp_path, monkeypatch):
    def lacking(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("hyperize.writing.version", lacking)
    save(hyperize(small("test_resnet"), compression=2), tmp_path / "f")
    load_timm(tmp_path / "f")


def test_what_cannot_be_written_is_refused(tmp_path):
    hyper = hyperize(small("test_resnet"), compression=2)
    with pytest.raises(FileError, match="cannot be written"):
        save(hyper, tmp_path / "no" / "such" / "folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be made"):
        save_pretrained(hyper, tmp_path / "file" / "below")
    with torch.device("meta"):
        hollow = hyperize(timm.create_model("test_resnet"), compression=2)
    with pytest.raises(ModelError, match="on meta"):
        save(hollow, tmp_path / "f")
    with pytest.raises(HyperizeError, match="not hyperized"):
        save(to_dense(hyper), tmp_path / "f")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), MemoryError])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_save_leaves_the_old_file(error, after, tmp_path, monkeypatch):
    path = tmp_path / "f"
    hyper = hyperize(small("test_resnet"), compression=2)
    save(hyper, path)
    old = path.read_bytes()
    real = files.save_file

    def interrupted(tensors, part, metadata):
        if after:
            real(tensors, part, metadata)
        else:
            Path(part).write_bytes(b"half")
        raise error

    monkeypatch.setattr(files, "save_file", interrupted)
    with pytest.raises((KeyboardInterrupt, FileError, MemoryError)):
        save(hyperize(small("test_resnet"), compression=3), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_killed_save_leaves_a_whole_file(tmp_path):
    """A process that saves over and over is killed at a random moment, several times."""
    code = """
        import sys, timm
        from hyperize import hyperize, save
        hyper = hyperize(timm.create_model("test_resnet", num_classes=5), compression=2)
        print("ready", flush=True)
        while True:
            save(hyper, sys.argv[1])
    """
    path = tmp_path / "f"
    for kill in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05 + 0.037 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        load_timm(path)
    shutil.rmtree(tmp_path)


def test_a_file_has_the_permissions_of_any_new_one(tmp_path):
    other = tmp_path / "other"
    other.touch()
    hyper = hyperize(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3)), compression=3)
    written = save(hyper, tmp_path / "hyper.safetensors")
    assert Path(written.path).stat().st_mode == other.stat().st_mode
