"""What turns photos into training pairs, pictures into files, and networks into a restorer of pictures.

    photos.pictures    read, enlarge and write pictures          photos.degrade    what makes the low-quality half
    photos.swin        the transformer block of the tagger, MANIQA and MUSIQ
    photos.pairs       find photos, hold some out, draw pairs     photos.tagger     content tags for the prompt
    photos.restorer    tiles, and what SanaSR and LinearSR share
"""
