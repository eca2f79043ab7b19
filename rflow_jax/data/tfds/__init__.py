"""GenRef as a data set of TensorFlow Datasets."""
