"""What a fine-tune changed: how far the weights went, where, and what that did to the answers.

    drift.drift(base, tuned) -> DriftReport       norms, sparsity, energy, from tensors alone
    divergence.divergence(base, tuned, prompts)   KL in both directions, two engines
    equal_norm.move(module, base, direction, n)   the base moved by n along another direction
    subjects.open_subject(source, name)           a run's generations, or any checkpoint
    answers.Pair(base)                            KL and scores of tuned weights beside the base

`esfast forgetting` writes what follows as FOLDER/forgetting.json (format version 1). Numbers are
plain JSON; a value that is not defined (0 elements) is null.

    {"format": "esfast-forgetting", "version": 1,
     "made": provenance,                       # esfast.provenance.provenance()
     "base": {"model": str, "dtype": str, "elements": int},   # dtype of the file's weights
     "groups": ["attention_qkv", "attention_output", "mlp", "norms", "embeddings", "other"],
     "thresholds": [1e-08, 1e-07, 1e-06, 1e-05, 0.0001, 0.001],
     "ulps": [0.5, 1, 2, 4, 8, 16],
     "energy_shares": [k, ...],                # shares of the elements, rising, the last is 1
     "subjects": [SUBJECT, ...],               # in the order of the command line
     "samples": {...} or null,                 # how KL was sampled, below
     "base_scores": [SCORE, ...],              # of the base, generation null
     "equal_norm": EQUAL_NORM or null,
     "notes": [str, ...]}                      # what a reader has to know, in plain words

SUBJECT, a run or a checkpoint:
    {"name": str,                              # unique in the file; a legend's text
     "kind": "run" or "checkpoint", "source": str,       # as given on the command line
     "generations": int or null,               # in the journal; null for a checkpoint
     "chain": hex or null,                     # the journal's check value at its end
     "settings": {...} or null,                # sigma, alpha, population_size, decay, ... of a run
     "noise_norms": [float, ...] or null,      # generation 0, 1, ...: the norm that coefficients
                                               # give by laws.py; null: checkpoints, runs with
                                               # l1 and l2 decay in turn, or with an anchor that
                                               # is not their base (a note says so)
     "dtype": str,                             # of the weights, and of the units in the last place
     "drift": [DRIFT, ...],                    # a measured generation each, rising
     "kl": [KL, ...], "scores": [SCORE, ...]}

DRIFT:
    {"generation": int or null,                # null for a checkpoint
     "checksum": hex or null,                  # of a run's weights there
     "whole": CHANGE, "groups": {group: CHANGE}, "layers": {"0": CHANGE, ...},
     "cells": [{"layer": int or null, "group": str, **CHANGE}, ...],  # null: outside the layers
     "energy": {"whole": ENERGY, "groups": {group: ENERGY}}}

CHANGE, of one set of elements; delta = tuned - base:
    {"elements": int, "norm": L2, "relative_norm": norm / L2 of the base,
     "rms": norm / sqrt(elements), "mean": mean of delta, "mean_abs": mean |delta|,
     "max_abs": max |delta|, "unchanged": share with delta == 0,
     "below": [share with |delta| < threshold, ...],        # as in "thresholds"
     "within_ulps": [share with |delta| <= n ulp(base), ...]}   # as in "ulps"

ENERGY, the cumulative-energy curve of sum delta^2:
    {"held": [share of the energy held by the largest k of the elements, ...],  # "energy_shares"
     "elements_for": {"0.5": share, "0.9": share, "0.99": share}}  # smallest share that holds it

KL, one direction on one set of prompts at one generation, in nats:
    {"generation": int or null, "prompts": name of the set, "kind": "target" or "prior",
     "direction": "KL(base || tuned)" or "KL(tuned || base)", "samples_from": "base" or "tuned",
     "count": prompts, "tokens": sampled tokens,
     "exact": ESTIMATES,                       # the sum over the vocabulary at each sampled prefix
     "log_ratio": ESTIMATES}                   # log p - log q of the sampled token
ESTIMATES: {"token_weighted": ESTIMATE, "prompt_averaged": ESTIMATE, "sequence": ESTIMATE}
ESTIMATE: {"value": nats, "low": nats, "high": nats}       # 95 % interval over the prompts

SCORE, greedy answers to held-out prompts:
    {"generation": int or null, "prompts": name of the set, "kind": "target" or "prior",
     "count": prompts, "score": mean, "score_95": [low, high], "solved": share or null,
     "solved_95": [low, high] or null, "failed_rewards": int,
     "max_new_tokens": int}                    # of an answer at most

EQUAL_NORM, changes brought to one length:
    {"norm": L2 of every change, "reference": name of the subject that it is of,
     "by": "whole" or "tensor",                # one length in all, or one for every tensor
     "controls": [{"name": str, "kind": "random" or "subject", "generation": int or null,
                   "norm": measured L2, "scale": factor on the change (null a tensor),
                   "seed": int or null, "kl": [KL, ...], "scores": [SCORE, ...]}, ...]}
"samples": {"temperature": 1.0, "max_new_tokens": int, "seed": int, "samples_per_prompt": int,
            "dtype": str}
"""

from __future__ import annotations
