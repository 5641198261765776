"""Numbers printed in the paper: its tables (arXiv 2404.04125v3) and the legends of its figures.

The figures are those in U:notebooks/plots; `U:` is bethgelab/frequency_determines_performance@11ef009. Models are named
BACKBONE|CORPUS, like in the authors' files.
"""

CURVE_MODELS = (  # ten of figure 2, then those of the controls in figure 4
    ("RN50|cc3m", "ViT-B-16|cc3m", "RN50|cc12m", "ViT-B-16|cc12m", "RN50|yfcc15m", "RN101|yfcc15m", "ViT-B-16|yfcc15m")
    + ("ViT-B-32|laion400m", "ViT-B-16|laion400m", "ViT-L-14|laion400m", "ViT-B-16|synthci30m")
    + ("ViT-B-32|laion200m_train_test_sim_normalized",)
)
NO = None  # no such figure, or no such number in it
PRINTED = {  # legends of the authors' figures by (task, counts, prompts or recall), in the order of CURVE_MODELS
    ("classification", "integrated", "class"): (0.97, 0.93, 0.93, 0.83, 0.96, 0.95, 0.96, NO, NO, NO, 0.82, NO),
    ("classification", "integrated", "simple"): (0.95, 0.96, 0.94, 0.86, 0.95, 0.96, 0.98, NO, NO, NO, NO, NO),
    ("classification", "integrated", "ensemble"): (0.96, 0.97, 0.94, 0.92, 0.94, 0.96, 0.97, 0.99, 0.98, 0.94, NO, NO),
    ("classification", "image", "class"): (0.98, 0.97, 0.97, 0.95, 0.82, 0.89, 0.92, 0.95, 0.91, 0.87, 0.93, 0.97),
    ("classification", "image", "simple"): (0.97, 0.97, 0.97, 0.94, 0.82, 0.94, 0.95, 0.96, 0.95, 0.95, NO, NO),
    ("classification", "image", "ensemble"): (0.98, 0.97, 0.97, 0.98, 0.82, 0.94, 0.95, 0.96, 0.96, 0.94, NO, NO),
    ("classification", "text", "class"): (0.92, 0.91, 0.95, 0.94, 0.85, 0.89, 0.88, 0.92, 0.85, 0.83, 0.89, NO),
    ("classification", "text", "simple"): (0.94, 0.91, 0.95, 0.93, 0.92, 0.92, 0.94, 0.94, 0.93, 0.90, NO, NO),
    ("classification", "text", "ensemble"): (0.93, 0.93, 0.96, 0.96, 0.93, 0.96, 0.93, 0.95, 0.94, 0.91, NO, NO),
    ("retrieval", "integrated", "i2t_k=1"): (1.00, 0.98, 0.96, 0.99, 0.99, 1.00, 0.99, 0.99, 0.99, 0.94, NO, NO),
    ("retrieval", "integrated", "i2t_k=5"): (0.99, 0.99, 0.94, 0.99, 0.99, 1.00, 0.99, 0.94, 0.94, 0.79, NO, NO),
    ("retrieval", "integrated", "i2t_k=10"): (0.99, 1.00, 0.96, 0.99, 0.99, 1.00, 0.99, 0.92, 0.86, 0.83, NO, NO),
    ("retrieval", "integrated", "t2i_k=1"): (1.00, 0.98, 0.99, 0.99, 0.99, 1.00, 0.99, 0.98, 0.97, 0.97, NO, NO),
    ("retrieval", "integrated", "t2i_k=5"): (1.00, 0.99, 0.99, 0.98, 1.00, 1.00, 0.99, 0.97, 0.97, 0.97, NO, NO),
    ("retrieval", "integrated", "t2i_k=10"): (1.00, 1.00, 0.98, 0.98, 1.00, 1.00, 0.99, 0.97, 0.97, 0.96, 0.98, NO),
    ("retrieval", "image", "i2t_k=1"): (0.92, 0.91, 0.96, 0.86, 0.93, 0.82, 0.90, 0.91, 0.91, 0.91, NO, NO),
    ("retrieval", "image", "i2t_k=5"): (0.94, 0.90, 0.79, 0.92, 0.92, 0.94, 0.95, 0.93, 0.91, 0.91, NO, NO),
    ("retrieval", "image", "i2t_k=10"): (0.95, 0.97, 0.86, 0.90, 0.92, 0.94, 0.96, 0.94, 0.91, 0.94, NO, NO),
    ("retrieval", "image", "t2i_k=1"): (0.99, 0.97, 0.98, 0.95, 0.86, 0.89, 0.98, 0.97, 0.99, 1.00, NO, NO),
    ("retrieval", "image", "t2i_k=5"): (0.99, 1.00, 0.99, 0.98, 0.90, 0.88, 0.93, 0.99, 0.99, 0.99, NO, NO),
    ("retrieval", "image", "t2i_k=10"): (0.98, 1.00, 0.98, 0.96, 0.90, 0.90, 0.95, 0.97, 0.99, 0.99, 0.99, 0.99),
    ("retrieval", "text", "i2t_k=1"): (0.97, 0.99, 0.97, 0.97, 0.76, 0.72, 0.84, 0.98, 0.98, 0.90, NO, NO),
    ("retrieval", "text", "i2t_k=5"): (0.98, 0.97, 0.95, 0.96, 0.77, 0.66, 0.59, 0.91, 0.98, 0.73, NO, NO),
    ("retrieval", "text", "i2t_k=10"): (0.97, 0.98, 0.95, 0.96, 0.64, 0.80, 0.71, 0.85, 0.93, 0.83, NO, NO),
    ("retrieval", "text", "t2i_k=1"): (0.95, 0.98, 0.98, 0.97, 0.90, 0.72, 0.88, 0.98, 0.98, 0.98, NO, NO),
    ("retrieval", "text", "t2i_k=5"): (0.95, 0.98, 0.95, 0.95, 0.60, 0.31, 0.80, 0.96, 0.97, 0.97, NO, NO),
    ("retrieval", "text", "t2i_k=10"): (0.93, 0.95, 0.93, 0.94, 0.66, 0.20, 0.74, 0.91, 0.97, 0.95, 0.98, NO),
}
FIGURE24 = {  # the first ten models, image counts at RAM++ thresholds
    0.5: (0.94, 0.93, 0.93, 0.94, 0.61, 0.49, 0.68, 0.76, 0.57, 0.07),
    0.6: (0.96, 0.96, 0.96, 0.94, 0.94, 0.94, 0.93, 0.87, 0.55, 0.58),
    0.7: (0.98, 0.97, 0.97, 0.95, 0.82, 0.89, 0.92, 0.95, 0.91, 0.87),
}
DERIVED = {  # LAION-400M in the main figure, recomputed with three digits: the repository lacks the figure file
    "ViT-B-32|laion400m": 0.957,
    "ViT-B-16|laion400m": 0.916,
    "ViT-L-14|laion400m": 0.855,
}
PEOPLE = 0.93  # legend of figure 17
SLOPES = (0.60, 1.58)  # figure 6: Let It Wag! on ImageNet, models below and above 50 %
TABLE3 = {  # misaligned pairs, and their share in percent
    "cc3m": (557_683, "16.81"),
    "cc12m": (2_143_784, "17.25"),
    "yfcc15m": (5_409_248, "36.48"),
    "laion_aesthetics": (23_104_076, "14.34"),
    "laion400m": (21_996_097, "5.31"),
}
TABLE4 = {  # Spearman's correlation of counts (U:notebooks/correlations_...); the text names no coefficient
    ("cc3m", "cc12m"): 0.79,
    ("cc3m", "yfcc15m"): 0.96,
    ("cc3m", "laion400m"): 0.63,
    ("cc12m", "yfcc15m"): 0.97,
    ("cc12m", "laion400m"): 0.74,
    ("yfcc15m", "laion400m"): 0.76,
}
TABLE6 = {  # mean accuracy at frequencies of 0, 1-10, 10-100, 100-1000, 1000-10000
    "RN50|cc3m": (5.10, 13.89, 20.18, 32.93, 44.30),
    "ViT-B-16|cc3m": (4.27, 11.98, 17.21, 27.48, 39.24),
    "RN50|cc12m": (12.91, 21.49, 27.75, 39.48, 50.38),
    "ViT-B-16|cc12m": (16.48, 25.59, 32.07, 45.65, 57.06),
    "RN50|yfcc15m": (16.49, 19.59, 24.12, 34.26, 39.97),
    "RN101|yfcc15m": (17.43, 22.06, 25.72, 36.77, 43.14),
    "ViT-B-16|yfcc15m": (20.75, 25.06, 29.68, 38.73, 45.96),
    "ViT-B-32|laion400m": (47.41, 46.42, 50.53, 55.96, 65.00),
    "ViT-B-16|laion400m": (51.77, 52.09, 57.12, 61.32, 70.73),
    "ViT-L-14|laion400m": (60.44, 58.87, 62.43, 67.63, 76.65),
}
TABLE9 = {  # percent on ImageNet and Let It Wag!; 20 of ImageNet's numbers are open_clip's (let_it_wag_eval.ipynb)
    "RN50|cc3m": (20.09, 3.74), "ViT-B-16|cc3m": (17.10, 3.01), "RN50|cc12m": (33.14, 8.92),
    "ViT-B-16|cc12m": (37.39, 11.49), "RN50|yfcc15m": (31.88, 13.15), "RN101|yfcc15m": (34.04, 15.19),
    "ViT-B-16|yfcc15m": (37.88, 19.25), "RN50|openai": (59.82, 31.93), "RN101|openai": (62.28, 31.88),
    "ViT-B-32|openai": (63.32, 33.52), "ViT-B-16|openai": (68.34, 37.85), "ViT-L-14|openai": (75.54, 45.31),
    "ViT-B-16|siglip": (78.49, 54.63), "ViT-L-16|siglip": (82.07, 61.50), "SO400M|siglip": (83.44, 67.32),
    "ViT-B-32|datacomp": (69.18, 46.90), "ViT-B-16|datacomp": (73.48, 52.89), "ViT-L-14|datacomp": (79.21, 63.04),
    "ViT-B-16|dfn": (76.24, 56.59), "ViT-H-14|dfn": (83.44, 71.91), "ViT-B-32|commonpool": (23.04, 7.73),
    "ViT-B-16|commonpool": (57.77, 20.97), "ViT-L-14|commonpool": (76.37, 46.96),
    "ViT-B-32|laion400m": (60.23, 32.88), "ViT-B-16|laion400m": (67.02, 39.13), "ViT-L-14|laion400m": (72.74, 46.59),
    "ViT-B-32|laion2b": (66.55, 41.79), "ViT-B-16|laion2b": (70.22, 44.21), "ViT-L-14|laion2b": (75.25, 51.03),
    "ViT-H-14|laion2b": (77.92, 58.98), "ViT-g-14|laion2b": (78.46, 59.01), "ViT-bigG-14|laion2b": (80.09, 63.54),
    "ViT-B-32|metaclip400m": (65.58, 40.50), "ViT-B-16|metaclip400m": (70.80, 46.50),
    "ViT-L-14|metaclip400m": (76.20, 52.78), "ViT-B-32|metaclip2.5b": (67.66, 43.84),
    "ViT-B-16|metaclip2.5b": (72.12, 49.32), "ViT-L-14|metaclip2.5b": (79.17, 57.48),
    "ViT-H-14|metaclip2.5b": (80.51, 62.59), "ViT-B-16|synthci30m": (30.67, 9.15),
}  # fmt: skip
