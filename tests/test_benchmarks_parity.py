"""The parity command: it passes on stored reference results, and fails on whatever differs from them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones.biggan import BigGANConfig, Discriminator, Generator, orthogonal_gradient
from benchmarks import parity
from fq import FeatureQuantize
from fq.stats import perplexity

REPOSITORY = Path(__file__).parents[1]
LOCAL = Path(__file__).parent / "data" / "golden"
SHARED = REPOSITORY.parent / "shared" / "golden"
FILES = sorted(LOCAL.rglob("*.npz"))


def run(capsys, *arguments):
    code = parity.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def altered(source, target, **changes):
    """Copy a golden file with some arrays replaced, added, or (None) left out."""
    with np.load(source) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays |= changes
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **{key: value for key, value in arrays.items() if value is not None})
    return target


def stored(source, key):
    with np.load(source) as archive:
        return archive[key].copy()


# ---- reference results are reproduced


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_reference_is_reproduced(capsys, path):
    code, lines, _ = run(capsys, path)
    assert (code, lines[-1]) == (0, "1 passed, 0 failed"), lines


def test_all_shared_references_are_reproduced(capsys):
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    code, lines, _ = run(capsys, SHARED, "--only", "fq,biggan,stylegan2,ugatit")
    assert code == 0, lines
    assert lines[-1].endswith(" passed, 0 failed")


def test_command_runs_as_a_module():
    path = LOCAL / "fq" / "single_vector_f64.npz"
    command = [sys.executable, "-W", "error", "-m", "benchmarks.parity", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("pass  fq/single_vector_f64.npz  fq  35 of 35 arrays  largest error 0.000 of")
    assert last == "1 passed, 0 failed"


# ---- files of the same form, other sizes and types


def npz(path, arrays, meta, key="meta"):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: value.detach().numpy() if torch.is_tensor(value) else value for name, value in arrays.items()
    }
    np.savez(path, **arrays, **{key: np.array(json.dumps(meta))})


def biggan_file(path, config, g_arguments, d_arguments, batch=2):
    """What the reference run stores, from our own networks: it exercises the checker, not the numbers."""
    torch.manual_seed(1)
    generator, discriminator = Generator(config), Discriminator(config)
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    networks = {"G": generator, "D": discriminator}
    arrays = {f"{n}.{k}": v.clone() for n, m in networks.items() for k, v in m.state_dict().items()}
    keys = {f"{n}_keys": [[k, list(v.shape)] for k, v in m.state_dict().items()] for n, m in networks.items()}
    parameters = {f"{n}_params": [k for k, _ in m.named_parameters()] for n, m in networks.items()}
    z, y = torch.randn(batch, generator.latent_dim), torch.arange(batch)
    real, real_y = torch.randn(batch, 3, config.resolution, config.resolution), 1 - torch.arange(batch)
    arrays |= {"z": z, "y": y, "x_real": real, "y_real": real_y}

    features = {}
    for name, module in discriminator.named_modules():
        if name.count(".") == 2 and name.startswith("blocks."):
            module.register_forward_hook(
                lambda m, a, out, name=name: features.update({name: features.get(name, out.clone())})
            )
    generator.eval(), discriminator.eval()
    with torch.no_grad():
        arrays["D_eval_real"] = discriminator(real, real_y)
        arrays["G_eval_out"] = generator(z, generator.shared(y))
        arrays["D_eval_fake"] = discriminator(arrays["G_eval_out"], y)
    for name, value in features.items():
        stats = torch.stack([value.mean(), value.std(), value.abs().max()])
        arrays[f"D_eval_feat.{name}.stats"] = stats.double()
    last = list(features)[-1]
    arrays[f"D_eval_feat.{last[:-2]}.out"] = features[last]

    generator.train(), discriminator.train()
    with torch.no_grad():
        fake = generator(z, generator.shared(y))
    logits = discriminator(torch.cat([fake, real]), torch.cat([y, real_y]))
    losses = torch.relu(1 - logits[batch:]).mean(), torch.relu(1 + logits[:batch]).mean()
    sum(losses).backward()
    arrays |= {"G_train_out": fake, "D_train_fake": logits[:batch], "D_train_real": logits[batch:]}
    arrays |= {"D_loss_real": losses[0], "D_loss_fake": losses[1]}
    first = "blocks.0.0.conv1.weight"
    arrays[f"D_step_grad.{first}"] = discriminator.get_parameter(first).grad.clone()
    norms = {"D_step_grad_norms": {k: p.grad.norm().item() for k, p in discriminator.named_parameters()}}
    for name, module in networks.items():
        arrays |= {f"{name}_after_dstep.{k}": v.clone() for k, v in module.named_buffers()}
    loss = -discriminator(generator(z, generator.shared(y)), y).mean()
    loss.backward()
    arrays["G_loss"] = loss
    norms["G_step_grad_norms"] = {k: p.grad.norm().item() for k, p in generator.named_parameters()}
    norms["G_ortho_grad_norms_1e-4"] = {
        k: orthogonal_gradient(p, 1e-4).norm().item()
        for k, p in generator.named_parameters()
        if p.ndim >= 2 and k != "shared.weight"
    }
    meta = {"resolution": config.resolution, "G_kwargs": g_arguments, "D_kwargs": d_arguments}
    npz(path, arrays, meta | keys | parameters | norms | {"G_dim_z": generator.latent_dim}, "meta_json")


@pytest.mark.parametrize(
    ("config", "g_arguments", "d_arguments"),
    [
        (
            BigGANConfig(
                g_channels=2, d_channels=2, latent_dim=6, wide=False, d_attention=(16,), num_classes=3
            ),
            {"G_ch": "2", "dim_z": "6"},
            {"D_ch": "2", "D_wide": "False", "D_attn": "16"},
        ),
        (
            BigGANConfig(
                resolution=128,
                g_channels=2,
                d_channels=2,
                latent_dim=12,
                shared_dim=5,
                hierarchical=True,
                g_attention=(32,),
                d_attention=(8,),
                num_classes=3,
                inplace_relu=True,
                sn_eps=1e-6,
            ),
            {"G_activation": "ReLU(inplace=True)", "SN_eps": "1e-06"},
            {"D_activation": "ReLU(inplace=True)", "SN_eps": "1e-06"},
        ),
    ],
    ids=["thin-attention-everywhere", "128px-hierarchical"],
)
def test_other_biggan_files_are_understood(tmp_path, capsys, config, g_arguments, d_arguments):
    biggan_file(tmp_path / "nameless.npz", config, g_arguments, d_arguments)
    code, lines, _ = run(capsys, tmp_path)
    assert code == 0, lines
    assert "  biggan  " in lines[0]


@pytest.mark.parametrize(
    ("config", "sites", "dtype"),
    [
        (BigGANConfig(resolution=64, d_channels=4, d_attention=(16,), num_classes=3), [1, 2], torch.float64),
        (BigGANConfig(d_channels=2, d_attention=(16,), wide=False, num_classes=3), [0, 3], torch.float32),
    ],
    ids=["64px-float64", "32px-attention-thin"],
)
def test_other_fq_discriminators_are_understood(tmp_path, capsys, config, sites, dtype):
    torch.manual_seed(2)
    model = Discriminator(config).to(dtype).eval()
    arrays, taps = {}, {}
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    for site in sites:
        block = model.blocks[site][0]
        block.register_forward_hook(lambda m, a, out, site=site: taps.update({site: out}))
    # Plain layers around the same weights: this is what the files hold.
    for name, module in model.named_modules():
        if hasattr(module, "normalised_weight"):
            weight = module.normalised_weight().detach()
            arrays[f"w.{name}.weight"] = weight
            if getattr(module, "bias", None) is not None:
                arrays[f"w.{name}.bias"] = module.bias
        if hasattr(module, "gamma"):
            arrays[f"w.{name}.gamma"] = module.gamma
    arrays = {re.sub(r"^(w\.blocks\.\d+)\.1\.", r"\1.2.", key): value for key, value in arrays.items()}
    x = torch.randn(2, 3, config.resolution, config.resolution, dtype=dtype, requires_grad=True)
    y = torch.tensor([0, 2])
    logit = model(x, y)
    total = 0
    for site in sites:
        layer = FeatureQuantize(
            taps[site].shape[1], 4, commitment_weight=0.5, reduction="none", compat="torch"
        )
        layer = layer.to(dtype).eval()
        _, codes, loss = layer(taps[site])
        arrays |= {
            f"fq{site}.embed": layer.codebook.t(),
            f"fq{site}.embed_avg": layer.ema_sum.t(),
            f"fq{site}.cluster_size": layer.ema_count,
            f"h{site}": taps[site],
            f"loss{site}": loss[:, None],
            f"ppl{site}": perplexity(torch.bincount(codes.flatten(), minlength=4).to(dtype)),
        }
        total = total + loss[:, None]
    arrays |= {"x": x, "y": y, "logit": logit, "quant_loss": total}
    arrays["grad_logit"] = torch.autograd.grad(logit.sum(), x, retain_graph=True)[0]
    arrays["grad_quant"] = torch.autograd.grad(total.mean(), x)[0]
    meta = {"resolution": config.resolution, "layers": sites, "K": 4, "commitment": 0.5, "decay": 0.8}
    npz(tmp_path / "d.npz", arrays, meta | {"mode": "regularize"})
    code, lines, _ = run(capsys, tmp_path)
    assert code == 0, lines
    assert any(".2.gamma" in key for key in arrays) and not any(".1.gamma" in key for key in arrays)


# ---- whatever differs is a failure


def shifted(key, relative=1e-3):
    """Change the largest number of an array."""

    def change(path):
        value = stored(path, key)
        place = np.unravel_index(np.abs(value).argmax(), value.shape)
        value[place] += 1 if value.dtype.kind in "iu" else relative * (abs(value[place]) or 1.0)
        return {key: value}

    return change


def smallest_code_shifted(key):
    """Change the smallest of the codes by far less than the scale of the largest."""

    def change(path):
        value = stored(path, key)
        column = np.abs(value).max(0).argmin()
        value[:, column] *= 1 + 1e-8
        return {key: value}

    return change


def norm_shifted(table, name):
    def change(path):
        meta = json.loads(str(stored(path, "meta_json")))
        meta[table][name] *= 1.01
        return {"meta_json": np.array(json.dumps(meta))}

    return change


def keys_swapped(path):
    meta = json.loads(str(stored(path, "meta_json")))
    meta["D_keys"][0], meta["D_keys"][1] = meta["D_keys"][1], meta["D_keys"][0]
    return {"meta_json": np.array(json.dumps(meta))}


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("fq/small_k16_f64.npz", shifted("s000_out", 1e-9), "s000_out is off"),
        ("fq/small_k16_f64.npz", shifted("s002_loss", 1e-9), "s002_loss is off"),
        ("fq/small_k16_f64.npz", shifted("s004_perplexity", 1e-9), "s004_perplexity is off"),
        ("fq/small_k16_f64.npz", shifted("s001_codes"), "s001_codes is off"),
        ("fq/small_k16_f64.npz", shifted("s001_counts"), "s001_counts is off"),
        ("fq/small_k16_f64.npz", shifted("s003_grad_total", 1e-9), "s003_grad_total is off"),
        ("fq/small_k16_f64.npz", shifted("s003_cluster_size", 1e-9), "s003_cluster_size is off"),
        ("fq/small_k16_f64.npz", smallest_code_shifted("s002_embed"), "s002_embed is off"),
        ("fq/small_k16_f64.npz", shifted("eval_grad_commit", 1e-9), "eval_grad_commit is off"),
        ("fq/small_k16_f64.npz", shifted("s000_x"), "is off"),
        ("fq/tf_ugatit_k16_f32.npz", shifted("s004_embed_avg"), "s004_embed_avg is off"),
        ("fq/d_biggan32_f32.npz", shifted("h2"), "h2 is off"),
        ("fq/d_biggan32_f32.npz", shifted("quant_loss"), "handle.loss() is off"),
        ("fq/d_biggan32_f32.npz", shifted("grad_quant"), "grad_quant is off"),
        ("fq/d_biggan32_f32.npz", shifted("w.blocks.1.0.conv_sc.weight", 0.1), "is off"),
        ("backbones/biggan32_cifar.npz", shifted("G_train_out", 1e-2), "G_train_out is off"),
        ("backbones/biggan32_cifar.npz", shifted("D_eval_feat.blocks.2.0.stats"), "blocks.2.0.stats is off"),
        ("backbones/biggan32_cifar.npz", shifted("D_after_dstep.embed.u0"), "D_after_dstep.embed.u0 is off"),
        (
            "backbones/biggan32_cifar.npz",
            norm_shifted("G_step_grad_norms", "linear.weight"),
            "meta.G_step_grad_norms is off",
        ),
        (
            "backbones/biggan32_cifar.npz",
            norm_shifted("G_ortho_grad_norms_1e-4", "linear.weight"),
            "meta.G_ortho_grad_norms_1e-4 is off",
        ),
        ("backbones/biggan32_cifar.npz", keys_swapped, "the state keys of D, their order or shapes differ"),
    ],
)
def test_an_altered_number_fails(tmp_path, capsys, file, change, named):
    altered(LOCAL / file, tmp_path / "copy.npz", **change(LOCAL / file))
    code, lines, _ = run(capsys, tmp_path)
    assert code == 1
    assert lines[0].startswith("FAIL") and named in lines[0]
    assert lines[-1] == "0 passed, 1 failed"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_array_that_nobody_reproduces_fails_by_name(tmp_path, capsys, path):
    altered(path, tmp_path / "copy.npz", surprise=np.zeros(3))
    code, lines, _ = run(capsys, tmp_path)
    assert code == 1
    assert "not reproduced: surprise" in lines[0]


def test_an_unknown_table_of_norms_fails_by_name(tmp_path, capsys):
    path = LOCAL / "backbones" / "biggan32_cifar.npz"
    meta = json.loads(str(stored(path, "meta_json"))) | {"more_norms": {"a": 1.0}}
    altered(path, tmp_path / "copy.npz", meta_json=np.array(json.dumps(meta)))
    code, lines, _ = run(capsys, tmp_path)
    assert code == 1 and "not reproduced: meta.more_norms" in lines[0]


def test_another_shape_is_a_failure_and_not_a_broadcast(tmp_path, capsys):
    path = LOCAL / "fq" / "d_biggan32_f32.npz"
    altered(path, tmp_path / "copy.npz", logit=stored(path, "logit")[:1])
    code, lines, _ = run(capsys, tmp_path)
    assert code == 1 and "logit has shape [1, 1] but ours [4, 1]" in lines[0]


def test_a_missing_input_is_named(tmp_path, capsys):
    altered(LOCAL / "fq" / "small_k16_f64.npz", tmp_path / "copy.npz", s003_x=None)
    code, lines, _ = run(capsys, tmp_path)
    assert code == 1 and "the inputs of 5 steps were expected, found 4" in lines[0]
    altered(LOCAL / "fq" / "d_biggan32_f32.npz", tmp_path / "copy.npz", **{"fq1.embed_avg": None})
    code, lines, _ = run(capsys, tmp_path)
    assert code == 1 and "array fq1.embed_avg is missing" in lines[0]


def test_a_nan_is_off_by_infinity(tmp_path, capsys):
    path = LOCAL / "fq" / "single_vector_f64.npz"
    value = stored(path, "s001_out")
    value.flat[0] = np.nan
    altered(path, tmp_path / "copy.npz", s001_out=value)
    code, lines, _ = run(capsys, tmp_path)
    assert code == 1 and "s001_out is off by inf" in lines[0]


def test_a_file_without_results_does_not_pass(tmp_path, capsys):
    path = LOCAL / "fq" / "single_vector_f64.npz"
    inputs = ("init_embed", "init_embed_avg", "init_cluster_size", "meta")
    with np.load(path) as archive:
        np.savez(tmp_path / "copy.npz", **{key: archive[key] for key in inputs})
    code, lines, _ = run(capsys, tmp_path)
    assert code == 1 and lines[-1] == "0 passed, 1 failed"


@pytest.mark.parametrize("content", [b"", b"not an archive", None], ids=["empty", "text", "truncated"])
def test_a_damaged_file_fails_and_the_others_are_still_checked(tmp_path, capsys, content):
    good = shutil.copy(LOCAL / "fq" / "single_vector_f64.npz", tmp_path / "good.npz")
    whole = Path(good).read_bytes()
    (tmp_path / "bad.npz").write_bytes(whole[: len(whole) // 2] if content is None else content)
    code, lines, _ = run(capsys, tmp_path, "--only", "fq")
    assert code == 1
    assert lines[0].startswith("FAIL") and "/bad.npz  unreadable" in lines[0]
    assert lines[1].startswith("pass") and lines[-1] == "1 passed, 1 failed"


# ---- kinds, folders, the exit code


def test_kind_is_told_by_content_and_not_by_name(tmp_path, capsys):
    shutil.copy(LOCAL / "fq" / "single_vector_f64.npz", tmp_path / "biggan_stylegan2.npz")
    code, lines, _ = run(capsys, tmp_path)
    assert code == 0 and "  fq  " in lines[0]


@pytest.mark.parametrize(
    ("keys", "folder", "kind"),
    [
        (["init_embed", "s000_x"], "vln", "fq"),
        (["w.linear.weight", "fq12.embed"], "x", "fq"),
        (["G.synthesis.b4.const", "D.b4.conv.weight"], "x", "stylegan2"),
        (["G_cam_logit", "G.UpBlock1.x"], "x", "ugatit"),
        (["D7.model.1.weight_orig"], "x", "ugatit"),
        (["D.blocks.0.0.conv1.weight"], "x", "biggan"),
        (["state/encoder/x"], "vln", "vln"),
        (["sd/encoder.x"], "optimus/tiny", "optimus"),
        (["anything"], "mystery", "mystery"),
    ],
)
def test_kinds(tmp_path, keys, folder, kind):
    assert parity.kind_of(tmp_path / folder / "file.npz", keys) == kind


def test_an_unknown_kind_is_counted_apart_and_fails_the_run(tmp_path, capsys):
    shutil.copy(LOCAL / "fq" / "single_vector_f64.npz", tmp_path / "good.npz")
    (tmp_path / "mystery").mkdir()
    np.savez(tmp_path / "mystery" / "odd.npz", foo=np.zeros(2))
    code, lines, _ = run(capsys, tmp_path)
    assert code == 1
    assert lines[-2:] == ["1 without a checker: 1 mystery", "1 passed, 0 failed"]
    code, lines, _ = run(capsys, tmp_path, "--only", "fq")
    assert code == 0 and lines[-1] == "1 passed, 0 failed"


def test_documents_count_in_the_folders_of_their_kinds_only(tmp_path):
    for name in ("vln/items.json.gz", "vln/items.json", "vln/scans/a.json", "other/a.json", "vln/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [path.name for path in parity.find_files([tmp_path, tmp_path / "vln"])]
    assert names == ["items.json", "items.json.gz"]


def test_nothing_to_check_exits_with_2(tmp_path, capsys):
    code, lines, error = run(capsys, tmp_path)
    assert code == 2 and not lines and f"no golden file below {tmp_path}" in error
    shutil.copy(LOCAL / "fq" / "single_vector_f64.npz", tmp_path)
    code, lines, error = run(capsys, tmp_path, "--only", "biggan,ugatit")
    assert code == 2 and not lines and "no golden file of kind biggan, ugatit" in error
    code, _, error = run(capsys, tmp_path / "absent")
    assert code == 2 and "absent does not exist" in error
    code, _, error = run(capsys, tmp_path, "--only", "fq,bigan")
    assert code == 2 and "--only names bigan but the kinds are fq, biggan" in error
