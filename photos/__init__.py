"""What turns photos into training pairs, and pictures into files.

    photos.pictures    read, enlarge and write pictures          photos.degrade    what makes the low-quality half
    photos.swin        the transformer block of the tagger and of MANIQA
    photos.pairs       find photos, hold some out, draw pairs     photos.tagger     content tags for the prompt
"""
