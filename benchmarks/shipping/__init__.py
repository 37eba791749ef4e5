"""What `ship_what_you_train.py` is made of: the model and its quantizer, and the ways to train and ship it."""
