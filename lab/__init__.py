"""How the bundled model was made and measured: prior, ablation, profile and stability. The product needs none of it.

    python -m lab.prior …        trains the bundled model's prior from photos alone
    python -m lab.ablation …     tables: the stages of the method, and what each part of the training is worth
    python -m lab.profile …      parameters, multiply-accumulates and latency by stage
    python -m lab.stability …    how much degradations change latents, beside pixels
"""
