"""Files that were damaged or made to harm: a named error, little memory and time, nothing executed."""

import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save

from vislr.core.errors import FormatError, VislrError
from vislr.formats import read_adapter
from vislr.formats.canonical import CanonicalAdapter, Entry
from vislr.formats.container import MAX_HEADER, MAX_TENSORS, read_header, read_tensors
from vislr.formats.doctor import examine
from vislr.formats.doctor_picture import as_text
from vislr.formats.exchange import FORMATS, read_canonical, render
from vislr.formats.weights import resize

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.mid_block.resnets.0.conv1"


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora(out=6, inside=4, r=2, **more):
    return {"lora_down.weight": values(r, inside), "lora_up.weight": values(out, r), "alpha": torch.tensor(1.0), **more}


def entries():
    """One adapter with a layer of every kind."""
    conv = (6, 4, 3, 3)
    loha = {f"hada_w{n}_{s}": values(*((6, 2) if s == "a" else (2, 4))) for n in "12" for s in "ab"}
    statistics = {"adabn_mean": values(4), "adabn_var": values(4).abs(), "adabn_count": torch.tensor(3)}
    sara = {"sara_index": torch.tensor([0, 3, 24], dtype=torch.int32), "sara_delta": values(3).double(),
            "sara_shape": torch.tensor([6, 4])}  # fmt: skip
    tucker = {"lora_down.weight": values(2, 4, 1, 1), "lora_up.weight": values(6, 3, 1, 1),
              "lora_mid.weight": values(3, 2, 3, 3)}  # fmt: skip
    flora = {"flora_core": values(2, 2), "flora_out": values(6, 2), "flora_in": values(4, 2)}
    return {
        Q: Entry("lora", lora(), (6, 4)),
        Q.replace("to_q", "to_k"): Entry("lora", lora(dora_scale=values(6, 1)), (6, 4)),
        CONV: Entry("lora", tucker, conv),
        Q.replace("to_q", "to_v"): Entry("loha", loha, (6, 4)),
        Q.replace("to_q", "to_out.0"): Entry("lokr", {"lokr_w1": values(2, 2), "lokr_w2": values(3, 2)}, (6, 4)),
        "unet.conv_in": Entry("diff", {"diff": values(*conv), "diff_b": values(6)}, conv),
        "unet.conv_norm_out": Entry("norm", {"w_norm": values(4), "b_norm": values(4)}, (4,)),
        CONV.replace("conv1", "conv2"): Entry(
            "convlora", {"convlora_A": values(6, 12), "convlora_B": values(18, 6)}, conv
        ),
        CONV.replace("conv1", "time_emb_proj"): Entry("flora", flora, (6, 4)),
        CONV.replace("resnets.0", "resnets.1"): Entry("sara", sara, (6, 4)),
        CONV.replace("resnets.0.conv1", "resnets.1.norm1"): Entry("adabn", statistics, (4,)),
    }


def seeds():
    """Whole files, as bytes, of every format."""
    every = CanonicalAdapter(entries(), "sd15")
    some = {name: entry for name, entry in every.entries.items() if entry.kind in ("lora", "loha", "lokr")}
    flux = {f"transformer.transformer_blocks.0.attn.to_{p}": Entry("lora", lora(4), (4, 4)) for p in "qkv"}
    found = {"vislr": render(every, "vislr")[:2]}
    found["kohya"] = render(every, "kohya", drop=True)[:2]
    found["comfy"] = render(CanonicalAdapter(flux, "flux"), "comfy")[:2]
    plain = CanonicalAdapter({name: entry for name, entry in some.items() if not entry.dora}, "sd15")
    found["diffusers"] = render(plain, "diffusers")[:2]
    found["peft"] = ({f"base_model.model.{k.removeprefix('unet.')}": v for k, v in found["diffusers"][0].items()}, {})
    return {name: save({k: v.contiguous() for k, v in t.items()}, header) for name, (t, header) in found.items()}


SEEDS = seeds()
ODD = [None, True, -1, 0, 1, 2**31, 2**63, 10**40, 1e308, -0.0, "", "F32", "BOOL", "../../etc/passwd", "a\x00b",
       "\x1b[2J", "é" * 300, [], [0], [-1], [1, 2], [2**62, 4], [[1]], {}, {"a": 1}, [1e9], [True], ["x"]]  # fmt: skip


def taken_apart(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def odd_inside(value, rng):
    """JSON data with one odd value somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: odd_inside(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [odd_inside(v, rng) if i == place else v for i, v in enumerate(value)]
    return rng.choice(ODD)


def flip_bits(data, rng):
    raw = bytearray(data)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.randint(1, 4)):
        limit = header if rng.random() < 0.7 else len(raw)
        raw[rng.randrange(limit)] ^= 1 << rng.randrange(8)
    return bytes(raw)


def cut_or_grow(data, rng):
    return data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + rng.randbytes(rng.randint(1, 64))


def odd_header(data, rng):
    header, body = taken_apart(data)
    return joined(odd_inside(header, rng), body)


def odd_metadata(data, rng):
    """The JSON inside of a metadata text changes."""
    header, body = taken_apart(data)
    metadata = header["__metadata__"] = header.get("__metadata__") or {"format": "pt"}
    key = rng.choice(list(metadata))
    try:
        metadata[key] = json.dumps(odd_inside(json.loads(metadata[key]), rng))
    except ValueError:
        metadata[key] = str(rng.choice(ODD))
    return joined(header, body)


def other_key(data, rng):
    header, body = taken_apart(data)
    keys = [key for key in header if key != "__metadata__"]
    key, other = rng.choice(keys), rng.choice(keys)
    new = rng.choice([
        key + ".x", key.replace(".", "_"), key.replace("mid_block", "down_blocks.99"), "../" + key, "aux." + key,
        key.rpartition(".")[0], "." + key, key.rpartition(".")[0] + "." + other.rpartition(".")[2],
        "C:\\" + key, key * 40,
        key.replace("lora_", "hada_"), "diffusion_model." + key, "base_model.model." + key, "lora_unet_" + key,
    ])  # fmt: skip
    return joined({new if k == key else k: v for k, v in header.items()}, body)


def twice(data, rng):
    """A key of the header a second time."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    key = rng.choice(list(header))
    text = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[rng.choice(list(header))])}}}"
    return joined(text.encode(), data[8 + length :])


def reshaped(data, rng):
    """A tensor of another shape or type with as many bytes."""
    header, body = taken_apart(data)
    key = rng.choice([key for key in header if key != "__metadata__"])
    info = header[key]
    size = info["data_offsets"][1] - info["data_offsets"][0]
    widths = {"F32": 4, "F16": 2, "I32": 4, "U8": 1, "BOOL": 1, "F64": 8, "I64": 8, "F8_E4M3": 1}
    dtype = rng.choice([info["dtype"], *widths])
    width = widths[dtype]
    if size % width == 0:
        count = size // width
        factor = rng.choice([n for n in (1, 2, 3, 4, 6) if count % n == 0])
        shape = rng.choice([[count], [factor, count // factor], [1, count], [count, 1, 1, 1], [1] * 7 + [count]])
        header[key] = {**info, "dtype": dtype, "shape": shape}
    return joined(header, body)


def odd_values(data, rng):
    """NaN, infinities and huge numbers where values were."""
    header, body = taken_apart(data)
    raw = bytearray(body)
    key = rng.choice([key for key in header if key != "__metadata__"])
    begin, end = header[key]["data_offsets"]
    words = (0x7FC00000, 0x7F800000, 0x7F7FFFFF, 0xFF7FFFFF, 0xFFFFFFFF, 0x00000001, 0)
    word = struct.pack("<I", rng.choice(words))
    for place in range(begin, end - 3, 4):
        if rng.random() < 0.5:
            raw[place : place + 4] = word
    return joined(header, bytes(raw))


MUTATIONS = (flip_bits, cut_or_grow, odd_header, odd_metadata, other_key, twice, reshaped, odd_values)
CASES = 500  # of each mutation
# A folder that gets the files of failing cases.
KEEP = os.environ.get("VISLR_KEEP_CASES")


def report(path):
    """What `vislr doctor` prints."""
    assert len(as_text(examine(path))) < 100_000


def worked_on(path, form):
    """Read, resized, written in a format."""
    adapter = read_canonical(path)
    render(resize(adapter, 2).adapter, form, drop=True)
    render(adapter, form, drop=True)


def consume(path, form):
    """Everything that reads a file; the messages of the named errors that it gave."""
    said = []
    for reading in (report, read_adapter, lambda path: worked_on(path, form)):
        try:
            reading(path)
        except VislrError as error:
            said.append(str(error))
    return said


def test_the_seeds_are_whole(tmp_path):
    for name, data in SEEDS.items():
        (tmp_path / "seed.safetensors").write_bytes(data)
        assert examine(tmp_path / "seed.safetensors").format == name
        assert read_canonical(tmp_path / "seed.safetensors").format == name


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutated_files_give_named_errors_or_adapters(mutation, tmp_path):
    rng = random.Random(mutation.__name__)
    path = tmp_path / "case.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for case in range(CASES):
        data = mutation(SEEDS[rng.choice(list(SEEDS))], rng)
        path.write_bytes(data)
        try:
            said = consume(path, FORMATS[case % 4])
        except Exception as error:
            if KEEP:
                shutil.copy(path, os.path.join(KEEP, f"{mutation.__name__}-{case}.safetensors"))
            raise AssertionError(f"{mutation.__name__} case {case}: {type(error).__name__}: {error}") from error
        assert all(len(text) < 2000 and "\x1b" not in text and "\n" not in text for text in said)
        refused += bool(said)
    assert refused > CASES // 10
    # The files have a few kilobytes; what they claim to have does not count.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert list(tmp_path.iterdir()) == [path]


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickled(tmp_path):
    return pickle.dumps(Trap(tmp_path / "executed"))


def torch_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickled(tmp_path))
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").unlink()
    return data


def deep(tmp_path):
    return joined(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"")


def bomb(tmp_path):
    return joined(b'{"a":[' + b"[]," * (MAX_HEADER // 3 - 10) + b"[]]}", b"")


def huge_metadata(tmp_path):
    return joined(json.dumps({"__metadata__": {"x": "y" * MAX_HEADER}}).encode(), b"")


def many_keys(tmp_path):
    info = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return joined({str(n): info for n in range(MAX_TENSORS + 1)}, b"")


def long_number(tmp_path):
    return joined(b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,0]}}', b"")


def huge_shape(tmp_path):
    return joined({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"abcd")


def huge_empty(tmp_path):
    return joined({"a": {"dtype": "F32", "shape": [0, 2**61, 8], "data_offsets": [0, 0]}}, b"")


def overlap(tmp_path):
    info = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return joined({"a": info, "b": info}, b"abcd")


def gap(tmp_path):
    return joined({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"abcdefgh")


def escape_in_key(tmp_path):
    return joined({"\x1b[2J.lora_up.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"abcd")


def path_in_key(tmp_path):
    name = f"{tmp_path}/executed.lora_up.weight"
    return joined({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0\0\0\0")


def number_in_metadata(tmp_path):
    return joined({"__metadata__": {"format": 1}}, b"")


def repeated(tmp_path):
    info = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    return joined(f'{{"a":{info},"a":{info}}}'.encode(), b"abcd")


def complex_dtype(tmp_path):
    return joined({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, b"abcdefgh")


NASTY = {
    pickled: "is a pickle; pickles can run code and are never opened",
    torch_zip: "a zip archive .a PyTorch pickle",
    deep: "nests too many|no JSON",
    bomb: "nests too many",
    huge_metadata: "header of 16,7.* bytes; expected at most",
    many_keys: "has 65,537 tensors|nests too many",
    long_number: "is no JSON",
    huge_shape: "of shape .* needs|has the shape",
    huge_empty: "has the shape",
    overlap: "overlaps another",
    gap: "leaves a gap before it",
    escape_in_key: "cannot be printed",
    path_in_key: r"exec.* lacks its 'lora_down.weight'",  # a long key is cut short in the message
    number_in_metadata: "__metadata__ is not text to text",
    repeated: "key 'a' is there twice",
    complex_dtype: "is of type 'C64'; expected one of",
}


# Seconds that the slowest machine keeps, and a file that is believed does not.
@pytest.mark.timeout(120)
@pytest.mark.parametrize("make", NASTY, ids=lambda make: make.__name__)
def test_nasty_files_are_named(make, tmp_path):
    path = tmp_path / "nasty.safetensors"
    path.write_bytes(make(tmp_path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=NASTY[make]) as caught:
        read_canonical(path)
    with pytest.raises(FormatError):
        read_adapter(path)
    if make is path_in_key:
        assert examine(path).traits["unplaced"] == 1
    else:
        with pytest.raises(FormatError, match=NASTY[make]):
            examine(path)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.timeout(120)
def test_tens_of_thousands_of_strays(tmp_path):
    """Every key unknown, each beside a list of as many sites: work that grows with the square would take hours."""
    metadata = taken_apart(SEEDS["vislr"])[0]["__metadata__"]
    manifest = json.loads(metadata["vislr.manifest"])
    manifest["sites"] = {f"unet.mid_block.attentions.{n}.proj_in": "lora" for n in range(20_000)}
    info = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = {f"unet.mid_block.attention.{n}.proj_in.lora_up.weight": {**info, "data_offsets": [4 * n, 4 * n + 4]}
              for n in range(20_000)}  # fmt: skip
    header["__metadata__"] = {**metadata, "vislr.manifest": json.dumps(manifest)}
    path = tmp_path / "strays.safetensors"
    path.write_bytes(joined(header, b"\0" * 80_000))
    found = examine(path)
    assert found.traits["unplaced"] == 20_000
    assert len(found.problems) < 20
    with pytest.raises(FormatError, match="belongs to no layer"):
        read_canonical(path)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "tucker", "sara"])
def test_a_small_file_cannot_stand_for_a_huge_matrix(kind, tmp_path):
    """Every one of these is below 3 MB and would need gigabytes or terabytes if its product were formed."""
    n = 2**17
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q."
    tensors = {
        "lora": {"lora_down.weight": torch.ones(1, n), "lora_up.weight": torch.ones(n, 1)},
        "loha": {f"hada_w{i}_{s}": torch.ones(*((n, 1) if s == "a" else (1, n))) for i in "12" for s in "ab"},
        "lokr": {"lokr_w1": torch.ones(700, 700), "lokr_w2": torch.ones(700, 700)},
        "tucker": {"lora_down.weight": torch.ones(n, 1, 1, 1), "lora_mid.weight": torch.ones(1, n, 1, 1),
                   "lora_up.weight": torch.ones(n, 1, 1, 1)},
        "sara": {"sara_index": torch.zeros(1, dtype=torch.int32), "sara_delta": torch.zeros(1),
                 "sara_shape": torch.tensor([2**20, 2**20])},
    }[kind]  # fmt: skip
    path = tmp_path / "huge.safetensors"
    path.write_bytes(save({key + suffix: tensor for suffix, tensor in tensors.items()}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=r"would change a weight of|has the shape"):
        read_canonical(path)
    assert examine(path).traits["unplaced"] > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_a_loha_of_huge_rank_is_worked_on_as_a_matrix(tmp_path):
    rank = 3000  # its exact LoRA would have rank 9,000,000
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q."
    tensors = {f"hada_w{i}_{s}": values(*((8, rank) if s == "a" else (rank, 8))) for i in "12" for s in "ab"}
    path = tmp_path / "loha.safetensors"
    path.write_bytes(save({key + suffix: tensor for suffix, tensor in tensors.items()}))
    adapter = read_canonical(path)
    entry = next(iter(adapter.entries.values()))
    expected = entry.delta(dtype=torch.float64)
    made = next(iter(resize(adapter, 8).adapter.entries.values())).delta(dtype=torch.float64)
    assert float((made - expected).norm() / expected.norm()) < 1e-5
    assert examine(path).layers == {Q: pytest.approx(float(expected.norm()), rel=1e-5)}


def test_a_sparse_file_larger_than_memory_is_refused_unread(tmp_path):
    path = tmp_path / "sparse.safetensors"
    size = 2**40
    header = json.dumps({"a.lora_up.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        os.truncate(path, 8 + len(header) + size)
    except OSError:
        pytest.skip("this file system has no files of that size")
    assert read_header(path).size == size
    with pytest.raises(FormatError, match=r"holds 1024.0 GiB; this machine"):
        read_tensors(path)


def test_pipes_folders_and_links_to_nowhere(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    for name, said in (("pipe", "not a regular file"), ("folder", "not a regular file"), ("link", "there is no file")):
        with pytest.raises(FormatError, match=said):
            read_header(tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"'lora.safetensor'; did you mean 'lora.safetensors'|there is no file"):
        read_header(tmp_path / "lora.safetensor")


def test_values_of_odd_places_and_types_are_read(tmp_path):
    body = b"\x01" + struct.pack("<f", 2.5) + struct.pack("<h", -3) + b"\x00"
    info = {
        "flag": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [1, 5]},
        "b": {"dtype": "I16", "shape": [], "data_offsets": [5, 7]},
        "c": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [7, 8]},
        "none": {"dtype": "F16", "shape": [0, 4], "data_offsets": [8, 8]},
    }
    path = tmp_path / "odd.safetensors"
    path.write_bytes(joined(info, body))
    found = read_tensors(path)
    assert found["flag"].tolist() == [True]
    assert found["a"].tolist() == [[2.5]]
    assert found["b"].item() == -3
    assert found["c"].dtype == torch.float8_e4m3fn
    assert found["none"].shape == (0, 4)
    assert read_tensors(path, keys=["b", "a"])["a"].tolist() == [[2.5]]
    with pytest.raises(FormatError, match="has no tensor 'd'"):
        read_tensors(path, keys=["d"])


def test_the_container_agrees_with_safetensors(tmp_path):
    from safetensors.torch import load

    for name, data in SEEDS.items():
        (tmp_path / name).write_bytes(data)
        mine, theirs = read_tensors(tmp_path / name), load(data)
        assert mine.keys() == theirs.keys()
        assert all(mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in theirs)
