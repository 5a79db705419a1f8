import sys,time
sys.path.insert(0,'/work/channels')
from squeeze.rewrite.prune import *
from fractions import Fraction as F
from squeeze.rewrite.run import Options
o=Options()
S=Path('/work/channels/sample_models')
for m,d in (('adder_mlp','adder'),('digits_autoencoder','digits'),('digits_cnn','digits')):
    t=time.time()
    r=prune(S/f'{m}.onnx',Plan(threshold=Limit(F(0),False)),Samples(str(S/f'{d}.npz'),count=100000),Options())
    print(m,[(c.site,c.details['channels'],c.reason) for c in r.changes],r.notes,r.after.macs/r.before.macs,time.time()-t)
r=prune(S/'digits_cnn.onnx',Plan(ratio=F(1,2)),Samples(str(S/'digits.npz')),Options())
print([(c.site,c.details,c.fit_error) for c in r.changes],r.notes,r.after.macs/r.before.macs)
r=prune(S/'digits_cnn.onnx',Plan(macs=Limit(F(1,2),True)),Samples(str(S/'digits.npz')),Options())
print([(c.site,c.details,c.fit_error) for c in r.changes],r.notes,r.after.macs/r.before.macs)
r=prune(S/'digits_cnn.onnx',Plan(macs=Limit(F(1,2),True),by='reconstruction'),Samples(str(S/'digits.npz')),Options())
print([(c.site,c.details,c.fit_error) for c in r.changes],r.notes,r.after.macs/r.before.macs)
