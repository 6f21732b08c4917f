"""The words of the demo world. Conditions and common words are real English; drugs, sites and people are made up."""

# ruff: noqa: SIM905 - word lists are read and edited as text

from __future__ import annotations

# Names of one condition. The first is the usual one; the others are spelling variants and synonyms. Words shared
# between conditions ("failure", "tumour", "chronic") are traps: they find the other condition's documents too.
CONDITIONS: tuple[tuple[str, ...], ...] = (
    ("heart failure", "heart insufficiency", "cardiac failure"),
    ("type 2 diabetes", "diabetes mellitus", "adult-onset diabetes"),
    ("breast tumour", "breast tumor", "breast carcinoma"),
    ("lung tumour", "lung tumor", "bronchial carcinoma"),
    ("colon tumour", "colon tumor", "colon carcinoma"),
    ("iron deficiency anaemia", "iron deficiency anemia", "iron depletion"),
    ("sickle cell anaemia", "sickle cell anemia", "sickle cell disease"),
    ("acute leukaemia", "acute leukemia", "blast leukaemia"),
    ("macular oedema", "macular edema", "macular swelling"),
    ("pulmonary oedema", "pulmonary edema", "pulmonary congestion"),
    ("rheumatoid arthritis", "rheumatoid disease", "rheumatoid polyarthritis"),
    ("gouty arthritis", "gout", "urate crystal arthropathy"),
    ("atopic dermatitis", "atopic eczema", "neurodermatitis"),
    ("plaque psoriasis", "psoriasis vulgaris", "psoriatic skin disease"),
    ("migraine headache", "migraine with aura", "hemicrania"),
    ("cluster headache", "cluster cephalalgia", "histamine headache"),
    ("partial epilepsy", "focal epilepsy", "focal seizures"),
    ("bipolar depression", "bipolar disorder", "manic-depressive illness"),
    ("postpartum depression", "postpartum mood disorder", "perinatal depression"),
    ("generalised anxiety", "generalized anxiety", "anxious neurosis"),
    ("chronic bronchitis", "obstructive bronchitis", "chronic airway obstruction"),
    ("bronchial asthma", "allergic asthma", "reactive airway disease"),
    ("viral hepatitis", "chronic hepatitis", "hepatitic infection"),
    ("liver cirrhosis", "hepatic cirrhosis", "end-stage hepatic fibrosis"),
    ("renal failure", "renal insufficiency", "kidney failure"),
    ("diabetic nephropathy", "diabetic kidney disease", "incipient nephropathy"),
    ("ulcerative colitis", "ulcerative proctocolitis", "inflammatory colitis"),
    ("infantile diarrhoea", "infantile diarrhea", "infantile gastroenteritis"),
    ("reflux oesophagitis", "reflux esophagitis", "gastric reflux"),
    ("ischaemic stroke", "ischemic stroke", "cerebral infarction"),
    ("subarachnoid haemorrhage", "subarachnoid hemorrhage", "subarachnoid bleeding"),
    ("atrial fibrillation", "atrial flutter", "atrial arrhythmia"),
    ("pulmonary embolism", "lung embolism", "pulmonary thrombosis"),
    ("postmenopausal osteoporosis", "senile osteoporosis", "low bone density"),
    ("bacterial pneumonia", "lobar pneumonia", "lower respiratory infection"),
    ("urinary sepsis", "urosepsis", "urinary tract infection"),
)

GENERIC_STEMS = tuple("zor vel tam lir mov ket bel dar fos nur pal rix sil tov umb wel cav gel hul jor".split())
GENERIC_MIDDLES = tuple("a i o u ami eno ira olu asti ede".split())
GENERIC_ENDINGS = tuple("tinib mab statin pril sartan gliptin oxetine olol dipine cillin zumab parin".split())
BRAND_STARTS = tuple("Ax Be Cor Dy El Fi Gly Hy Ino Jan Ky Lu Mer Nov Oxi Pro Qua Re Sy Tri Ux Vi Xa Zel".split())
BRAND_ENDINGS = tuple("vance dora plex tiva ryx mira nova zene quel sia lyte dane cort fene".split())

SURNAME_STARTS = tuple("Oka Lind Bram Tor Vas Mar Hol Pet Ngu Ros Kow Fer Yam Dub Stei Cal".split())
SURNAME_ENDINGS = tuple("for berg well ensen quez chetti lund rov yen setti alski nandez moto ois ner lahan".split())
SITES = tuple(
    """Lisbon Oslo Porto Leeds Graz Lyon Turin Basel Ghent Krakow Malmo Aarhus Bergen Utrecht Bilbao Cork Tartu Vilnius
    Nantes Padua Zagreb Split Sofia Izmir Haifa Nairobi Accra Kumasi Lima Quito Bogota Medellin Cusco Recife Cordoba
    Rosario Osaka Kobe Sendai Busan Daegu Hanoi Cebu Penang Perth Hobart Dunedin Calgary Halifax Tucson""".split()
)
ACRONYM_PARTS = (
    tuple("AL BRI CAR DE EM FAL GRA HEL IN LO ME NO OP PRE RA SO TE VI".split()),
    tuple("DOR MAX NIX PAS RIS SET TUM VAN ZEL CON".split()),
)

POPULATIONS = (
    "adults", "older adults", "children", "adolescents", "pregnant women", "men", "women", "veterans",
    "outpatients", "inpatients", "young adults", "nursing home residents",
)  # fmt: skip
OUTCOMES = (
    "overall survival", "quality of life", "hospital admission", "adverse events", "symptom relief",
    "blood pressure", "pain intensity", "functional status", "treatment adherence", "relapse rate",
    "length of stay", "body weight", "sleep quality", "fatigue severity",
)  # fmt: skip
PLAIN_COMPARATORS = ("placebo", "usual care", "no treatment", "standard therapy", "a lower dose", "watchful waiting")
DESIGNS = (
    "randomised controlled trial", "randomized trial", "prospective cohort study", "retrospective analysis",
    "crossover study", "multicentre trial", "multicenter trial", "open label extension", "systematic evaluation",
    "case control study",
)  # fmt: skip
FINDINGS = ("improved", "did not change", "worsened slightly", "was comparable", "increased", "was reduced")
MARKERS = (
    "serum creatinine", "plasma glucose", "inflammatory cytokines", "platelet counts", "liver enzymes",
    "bone turnover markers", "urinary albumin", "oxygen saturation", "cortisol levels", "lipid profiles",
    "gene expression", "receptor density", "heart rate variability", "gut permeability", "antibody titres",
)  # fmt: skip
