"""A world for real language models: one short sentence that uses four given words, graded by a program.

The task is that of CommonGen (Lin et al., 2020, arXiv 1911.03705), with words and requests of its own.

words.py      the vocabulary: scenes of daily life, inflected forms (words.toml)
requests.py   phrasings; which requests belong to evaluation
sentence.py   what counts as a sentence, and the reason if a text is none
oracle.py     grades any answer to any request with 0 to 5 points
annotator.py  how the verdict reads as a judgement
edits.py      cheap edits of answers, so that every verdict has its share of EFT
corpus.py     seed data from M0's answers, evaluation prompts
measures.py   metrics of answers and judgements
"""
