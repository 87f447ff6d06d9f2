"""How the bundled model was made and measured: prior, ablation, profile and stability. The product needs none of it.

    python -m lab.prior …        trains the bundled model's prior from photos alone
    python -m lab.ablation …     tables: the stages of the method, and what each part of the training is worth
    eval.py --profile            parameters, multiply-accumulates and latency by stage      (lab/profile.py)
    eval.py --stability          how much degradations change latents, beside pixels        (lab/stability.py)
"""
