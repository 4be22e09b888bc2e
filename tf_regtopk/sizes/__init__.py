"""Numbers of entries, words and bytes, computed without TensorFlow.

The codecs and topologies write and send what is counted here. The plans of
`advise` count the same, and need no TensorFlow for that.
"""
