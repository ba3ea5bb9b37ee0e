"""GRIN-MoE as plain loops in float64, from released tensors and config alone: the yardstick of the parity tests.

It shares no code with the package: one token, one head, one expert at a time, as the paper and the release say.
"""

import math

import torch


def layer_norm(x, weight, bias, eps):
    x = x - x.mean()
    return x / torch.sqrt((x * x).mean() + eps) * weight + bias


def rotate(x, position, theta):
    """RoPE of one head's vector: coordinate i turns together with coordinate i + d/2."""
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def choose_experts(z, top_k, eps):
    """Inference routing: list of (expert, weight)."""
    taken, chosen = set(), []
    for _ in range(top_k):
        left = [i for i in range(len(z)) if i not in taken]
        best = max(left, key=lambda i: z[i].item())
        top = z[best].item()
        kept = [i for i in left if z[i].item() == top or (top - z[i].item()) / max(abs(z[i].item()), top) <= 2 * eps]
        total = sum(math.exp(z[i].item() - top) for i in kept)
        chosen.append((best, 1 / total))
        taken.add(best)
    return chosen


def reference_logits(config, tensors, input_ids):
    """Logits `[sequence, vocab]` of one sequence, float64.

    Args:
        config: the released config.json as a dict.
        tensors: released names -> tensors.
        input_ids: list of ints.
    """
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    eps, window = config["rms_norm_eps"], config["sliding_window"]
    length = len(input_ids)

    def linear(x, name):
        y = weights[f"{name}.weight"] @ x
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    stream = [weights["model.embed_tokens.weight"][i].clone() for i in input_ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"

        def norm(x, name, prefix=prefix):
            return layer_norm(x, weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"], eps)

        normed = [norm(x, "input_layernorm") for x in stream]
        projected = {
            name: [linear(x, f"{prefix}.self_attn.{name}_proj").view(-1, head_dim) for x in normed] for name in "qkv"
        }
        for t in range(length):
            for name in "qk":
                rows = projected[name][t]
                projected[name][t] = torch.stack([rotate(row, t, config["rope_theta"]) for row in rows])
        attended = []
        for t in range(length):
            # W released: the query itself and the W keys before it.
            seen = [s for s in range(t + 1) if window is None or t - s <= window]
            out = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = torch.stack([projected["q"][t][head] @ projected["k"][s][group] for s in seen])
                probabilities = torch.softmax(scores / math.sqrt(head_dim), dim=0)
                out.append(sum(p * projected["v"][s][group] for p, s in zip(probabilities, seen, strict=True)))
            attended.append(linear(torch.cat(out), f"{prefix}.self_attn.o_proj"))
        stream = [x + y for x, y in zip(stream, attended, strict=True)]

        moe = f"{prefix}.block_sparse_moe"
        for t in range(length):
            x = norm(stream[t], "post_attention_layernorm")
            z = weights[f"{moe}.gate.weight"] @ x
            for expert, weight in choose_experts(z, config["num_experts_per_tok"], config["router_jitter_noise"]):
                gate, up = (weights[f"{moe}.experts.{expert}.{part}.weight"] @ x for part in ("w1", "w3"))
                inner = gate / (1 + torch.exp(-gate)) * up
                stream[t] = stream[t] + weight * (weights[f"{moe}.experts.{expert}.w2.weight"] @ inner)

    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    norm_weight, norm_bias = weights["model.norm.weight"], weights["model.norm.bias"]
    logits = torch.stack([weights[head] @ layer_norm(x, norm_weight, norm_bias, eps) for x in stream])
    return logits + weights["lm_head.bias"] if "lm_head.bias" in weights else logits
