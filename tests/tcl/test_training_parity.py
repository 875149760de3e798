"""Losses, gradients and optimiser steps against the authors'."""

import json

import numpy as np
import pytest
import torch

from tclkit.tcl.losses import LossWeights, pool_by_masks
from tclkit.tcl.model import similarity
from tclkit.tcl.official import clip_name, our_name
from tclkit.tcl.schedule import learning_rate, parameter_groups

STAGES = {"ust": "decoder", "full": "full"}
LOSSES = ("tcli_loss", "tclf_loss", "area_loss", "neg_area_loss", "tv_img_loss", "tv_mask_loss")


def cosine_sum(flat: np.ndarray) -> float:
    return float((flat * np.cos(0.37 * np.arange(flat.size))).sum())


def flat_double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().flatten().numpy()


@pytest.mark.parametrize("tile", [0, 1, 3, 256])
@pytest.mark.parametrize("phase", STAGES)
def test_losses_and_gradients_are_the_authors(phase, tile, official_model, arrays, check):
    data = arrays("train_B4.npz")
    image, tokens, noise = (torch.from_numpy(data[name]) for name in ("image", "tokens", "uniform_noise"))
    official_model.train()
    official_model.train_stage(STAGES[phase])
    losses = official_model(image, tokens, noise_uniform=noise, weights=LossWeights(tile=tile))
    total = sum(losses.values())
    total.backward()
    for name in LOSSES:
        check("losses", losses[name], data[f"{phase}/{name}"])
    check("losses", total, data[f"{phase}/total"])
    grads = {name: p.grad for name, p in official_model.named_parameters() if p.grad is not None}
    theirs = {our_name(str(name)): str(name) for name in data[f"{phase}/grad_names"]}
    assert grads.keys() == theirs.keys()
    for name, grad in grads.items():
        check_gradient(flat_double(grad), data, phase, theirs[name], check)
    total_norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    check("gradient norm", total_norm, data[f"{phase}/grad_norm_global"])


def check_gradient(flat, data, phase, name, check):
    norm = float(data[f"{phase}/gradnorm/{name}"])
    check("gradient norm", np.linalg.norm(flat), norm)
    check("gradient sums", flat.sum(), data[f"{phase}/gradsum/{name}"], scale=norm)
    check("gradient sums", cosine_sum(flat), data[f"{phase}/graddot/{name}"], scale=norm)
    whole = data.get(f"{phase}/grad/{name}")
    if whole is not None:
        check("gradients", flat, whole.flatten())
    else:
        check(
            "gradients", flat[np.linspace(0, flat.size - 1, 256).astype(np.int64)], data[f"{phase}/gradsample/{name}"]
        )


def test_values_on_the_way_are_the_authors(official_model, arrays, check):
    data = arrays("train_B4.npz")
    text = official_model.encode_text(torch.from_numpy(data["tokens"]))
    embedding = official_model.image_features(torch.from_numpy(data["image"])).grounded_BDhw
    masks = torch.sigmoid(official_model.grounder.mask(similarity(embedding, text)))
    check("text embedding, raw", text, data["text_emb"])
    check("training intermediates", embedding, data["masker_image_emb_BCHW"])
    check("training intermediates", masks, data["mask_soft_all"])
    check("training intermediates", pool_by_masks(embedding, masks), data["pooled_image_emb_BNC"])


@pytest.mark.parametrize("tile", [0, 3])
def test_four_steps_are_the_authors(tile, official_model, arrays, check):
    data = arrays("train_steps.npz")
    config = json.loads(str(data["config"]))
    image, tokens, noise = (torch.from_numpy(data[name]) for name in ("image", "tokens", "uniform_noise_per_step"))
    groups = parameter_groups(official_model, config["weight_decay"])
    adam = config["optimizer"]
    optimizer = torch.optim.AdamW(groups, lr=config["base_lr"], betas=tuple(adam["betas"]), eps=adam["eps"])
    official_model.train()
    for step in range(4):
        official_model.train_stage("decoder" if step < config["ust_steps"] else "full")
        lr = learning_rate(step, **{key: config[key] for key in ("base_lr", "min_lr", "warmup_steps", "total_steps")})
        check("learning rate", lr, data[f"step{step}/lr_used"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = official_model(image, tokens, noise_uniform=noise[step], weights=LossWeights(tile=tile))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(official_model.parameters(), config["clip_grad"])
        optimizer.step()
        check("gradient norm", norm, data[f"step{step}/grad_norm_before_clip"])
        for name in LOSSES:
            check("losses", losses[name], data[f"step{step}/{name}"])
        assert check_parameters(official_model, data, step, check) >= 39


def check_parameters(model, data, step, check) -> int:
    parameters = dict(model.named_parameters())
    prefix = f"step{step}/paramnorm/"
    names = [key.removeprefix(prefix) for key in data if key.startswith(prefix)]
    for name in names:
        flat = flat_double(parameters[our_name(name)])
        norm = float(data[prefix + name])
        check("parameter sums after steps", np.linalg.norm(flat), norm)
        check("parameter sums after steps", cosine_sum(flat), data[f"step{step}/paramdot/{name}"], scale=norm)
        whole = data.get(f"step{step}/param/{name}")
        if whole is not None:
            check("parameters after steps", flat, whole.flatten())
    return len(names)


def test_parameter_groups_are_the_authors(official_model, arrays):
    """The same tensors decay; inside a group the order is that of open_clip's blocks."""
    data = arrays("train_steps.npz")
    names = {id(parameter): name for name, parameter in official_model.named_parameters()}
    groups = parameter_groups(official_model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    for group, key in zip(groups, ("decay_names", "nodecay_names"), strict=True):
        ours = {names[id(parameter)] for parameter in group["params"]} - {"clip.logit_scale"}
        assert ours == {our_name(str(name)) or f"clip.{clip_name(str(name))}" for name in data[key]}


def test_only_learning_tensors_get_gradients(official_model, arrays):
    """What is frozen must not cost memory for a backward pass."""
    data = arrays("train_B4.npz")
    official_model.train_stage("decoder")
    losses = official_model(torch.from_numpy(data["image"]), torch.from_numpy(data["tokens"]))
    sum(losses.values()).backward()
    assert all(p.grad is None for p in official_model.clip.parameters())
    assert all(p.grad is None for p in official_model.grounder.block.parameters())
    assert all(p.grad is not None for p in official_model.parameters() if p.requires_grad)
