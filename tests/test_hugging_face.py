"""Hugging Face models, wrapped: every route against the module itself, with padding in the batch.

They are built from small configurations with random weights; nothing is downloaded.
"""

import copy

import pytest
import torch
from oracles import F64, draw, relative_error
from outside import TOKENS, Case, check_curvature, check_gradients, check_run, check_scores
from torch import nn

import msif_lab as msif

transformers = pytest.importorskip("transformers")

VOCABULARY = 30
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
}
DISTIL = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12}
GPT2 = {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
OPT = {"ffn_dim": 12, "word_embed_proj_dim": 8}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
VIT = {"image_size": 8, "patch_size": 4}


def tokens(n, seed=0):
    """Token ids and masks ``(n, TOKENS)``, padded to different lengths."""
    ids = torch.randint(3, VOCABULARY, (n, TOKENS), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(n, TOKENS, dtype=torch.long)
    for i in range(n):
        mask[i, TOKENS - i % 4 :] = 0
    return ids * mask, mask


def sentences(n, seed=0):
    ids, mask = tokens(n, seed)
    y = (ids == 5).any(1).long() + (ids[:, 0] > VOCABULARY // 2)
    return msif.Examples({"input_ids": ids, "attention_mask": mask}, y)


def texts(n, seed=0):
    ids, mask = tokens(n, seed)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return msif.Examples(inputs, ids.masked_fill(mask == 0, -100))


def translations(n, seed=0):
    ids, mask = tokens(n, seed)
    answers, kept = tokens(n, seed + 50)
    before = torch.cat([torch.zeros(n, 1, dtype=torch.long), answers[:, :-1]], 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": before}
    return msif.Examples(inputs, answers.masked_fill(kept == 0, -100))


def images(n, seed=0):
    return msif.Examples(draw(n, 3, 8, 8, seed=seed), torch.arange(n) % 3)


def logits(model, batch):
    return model(**batch).logits


def uncached(model, batch):
    return model(**batch, use_cache=False).logits


def pixels(model, batch):
    return model(batch).logits


def answer_loss(outputs, labels):
    """Of the positions that are not padding, whose labels are -100."""
    losses = nn.functional.cross_entropy(outputs.transpose(1, 2), labels, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


def language_loss(outputs, labels):
    return answer_loss(outputs[:, :-1], labels[:, 1:])


def built(name, attention="sdpa", seed=0, **settings):
    """A model class with a small configuration, in float64."""
    kind = getattr(transformers, name)
    config = kind.config_class(**(SMALL | settings))
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = kind(config).double().eval()
    with torch.no_grad():  # initial weights are so small that attention is the same everywhere
        for i, p in enumerate(model.parameters()):
            p.add_(0.2 * draw(*p.shape, seed=1000 * seed + i))
    return model


def case(name, attention="sdpa", **settings):
    model = built(name, attention, **settings)
    make, call, loss = sentences, logits, msif.cross_entropy
    if "LM" in name:
        make, call, loss = texts, uncached, language_loss
    elif "ConditionalGeneration" in name:
        make, call, loss = translations, uncached, answer_loss
    elif "Image" in name:
        make, call = images, pixels
    return Case(model, call, make(6), make(2, seed=1), loss, name in COARSE or attention == "eager")


# In float32 whatever their dtype: norms, or the softmax of eager attention.
COARSE = {"LlamaForCausalLM", "Qwen2ForCausalLM", "GemmaForCausalLM", "MistralForCausalLM"}
COARSE |= {"T5ForConditionalGeneration", "LlamaForSequenceClassification"}
GROUPED = {"num_key_value_heads": 1}
MODELS = {
    "GPT2LMHeadModel": GPT2,
    "LlamaForCausalLM": GROUPED,
    "LlamaForSequenceClassification": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "GemmaForCausalLM": GROUPED | {"head_dim": 4},
    "MistralForCausalLM": GROUPED,
    "OPTForCausalLM": OPT,
    "ViTForImageClassification": VIT,
    "BertForSequenceClassification": {},
    "DistilBertForSequenceClassification": DISTIL,
    "RobertaForSequenceClassification": {},
    "T5ForConditionalGeneration": T5,
}
EAGER = ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForSequenceClassification"]
CASES = [(name, "sdpa") for name in MODELS] + [(name, "eager") for name in EAGER]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_hugging_face_models_are_scored_as_plain_autograd_says(name, attention):
    one = case(name, attention, **MODELS[name])
    pipeline = one.pipeline().fit(progress=False)
    check_gradients(one, pipeline)
    check_curvature(one, pipeline)
    check_scores(one, pipeline)
    check_run(one, pipeline)


def test_the_padding_mask_counts():
    """Negative control: the same model without its mask has other gradients."""
    one = case("BertForSequenceClassification")
    pipeline = one.pipeline().adopt()
    full = pipeline.trained()[0]
    one.call = lambda model, batch: model(input_ids=batch["input_ids"]).logits
    ours = torch.cat([g for _, g in msif.per_example_gradients(pipeline.objective(0), full)])
    assert relative_error(ours, one.gradients(one.train, full)) > 1e-2


def test_a_tied_weight_has_the_gradient_of_both_its_uses():
    one = case("GPT2LMHeadModel", **GPT2)
    pipeline = one.pipeline().adopt()
    o, full = pipeline.objective(0), pipeline.trained()[0]
    assert "lm_head.weight" not in o.trained_names
    span = o.layout.spans["transformer.wte.weight"]
    ours = torch.cat([g for _, g in msif.per_example_gradients(o, full)])[:, span]
    untied = copy.deepcopy(one.model)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    uses = [[], []]
    for i in range(len(one.train)):
        value = one.loss(one.outputs(untied, one.train, i), one.train.y[i : i + 1]).sum()
        both = torch.autograd.grad(value, [untied.transformer.wte.weight, untied.lm_head.weight])
        for rows, part in zip(uses, both, strict=True):
            rows.append(part.reshape(-1))
    words, head = map(torch.stack, uses)
    assert relative_error(ours, words + head) < 1e-9
    assert min(relative_error(ours, words), relative_error(ours, head)) > 0.1


def test_a_tied_padding_row_that_the_loss_sees_is_no_derivative():
    """OPT's padding row has no gradient as a word but one as an output: no Hessian fits that."""
    ids, mask = tokens(6)
    data = msif.Examples({"input_ids": ids, "attention_mask": mask}, ids)
    model = msif.wrap(built("OPTForCausalLM", **OPT), uncached)
    stage = msif.Stage("fit", model, data, loss=msif.next_token_loss, weight_decay=0.05)
    with pytest.raises(msif.UnsupportedModelError, match="not the derivative of the loss, off by"):
        msif.Pipeline([stage])


def classifier(labels, seed):
    return msif.wrap(built("BertForSequenceClassification", seed=seed, num_labels=labels), logits)


def two_stages(link):
    recipe = msif.SGD(0.1, epochs=1, batch_size=3)
    later = sentences(6, seed=4)
    later.y[:] = later.y.clamp(max=1)
    return msif.Pipeline(
        [
            msif.Stage("pre", classifier(3, 0), sentences(6), weight_decay=0.05, recipe=recipe),
            msif.Stage(
                "fine", classifier(2, 1), later, weight_decay=0.05, recipe=recipe, link=link
            ),
        ]
    )


@pytest.mark.parametrize("link", [msif.Frozen(), msif.Proximal(0.1, shared="bert.")])
def test_two_stages_share_by_the_models_own_names(link, tmp_path):
    pipeline = two_stages(link).fit(progress=False)
    functional = pipeline.functional(1)
    shared = functional.frozen + functional.coupled
    assert all(name.startswith("bert.") for name in shared)
    queries = sentences(2, seed=8)
    queries.y[:] = queries.y.clamp(max=1)
    attributor = msif.UnrolledInfluence().fit(pipeline, progress=False)
    ours = attributor.score(queries, progress=False).values[:, 1]
    weights = torch.ones(2, 6, dtype=F64)
    weights[:, 1] += 1e-4 * torch.tensor([1.0, -1.0], dtype=F64)
    q = pipeline.retrain(weights, progress=False).evaluate(queries)
    assert relative_error(ours, (q[:, 0] - q[:, 1]) / 2e-4) < 1e-6
    pipeline.save(tmp_path / "p")
    again = two_stages(link).load(tmp_path / "p")
    assert all(map(torch.equal, pipeline.trained(), again.trained()))
    similar = msif.RepresentationSimilarity(layer="classifier").fit(pipeline).score(queries)
    assert similar.values.shape == (2, 6)


def last_hidden(model, batch):
    return model(**batch)


RETURNS = {
    "object": (
        last_hidden,
        r"returns SequenceClassifierOutput, .* call return one of \['logits'\]",
    ),
    "tuple": (lambda m, b: m(**b, return_dict=False), r"returns tuple, .* one of its 1 members"),
    "nothing": (lambda m, b: None, "returns NoneType, not a tensor"),
    "loss": (
        lambda m, b: m(**b, labels=torch.zeros(len(b["input_ids"]), dtype=torch.long)).loss,
        "returns a single number, .* the logits rather than the mean loss",
    ),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_is_no_tensor_of_outputs_is_refused_at_construction(name):
    call, words = RETURNS[name]
    one = case("BertForSequenceClassification")
    one.call = call
    with pytest.raises(msif.UnsupportedModelError, match=words):
        one.pipeline()


def test_a_model_without_wrap_is_told_of_it():
    data = sentences(6)
    model = built("BertForSequenceClassification")
    with pytest.raises(ValueError, match=r"dictionary of \['input_ids', .*msif\.wrap\(model, call"):
        msif.Pipeline([msif.Stage("fit", model, data)])
    words = msif.Examples(data.x["input_ids"], data.y)
    with pytest.raises(msif.UnsupportedModelError, match=r"use msif\.wrap\(model, call=\.\.\.\)"):
        msif.Pipeline([msif.Stage("fit", model, words)])
    model = msif.wrap(model.train(), logits)
    with pytest.raises(msif.UnsupportedModelError, match=r"'bert\.embeddings\.dropout'.*eval"):
        msif.Pipeline([msif.Stage("fit", model, data)])
