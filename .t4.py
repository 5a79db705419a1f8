import sys
sys.path.insert(0,'/work/channels')
from squeeze.rewrite.channels.exact import *
from squeeze.rewrite.channels import *
from squeeze.rewrite import criteria
from squeeze import shapes as S
from squeeze.calibrate.data import open_data
for m,d in (('adder_mlp','adder'),('digits_autoencoder','digits')):
    M=models.load(f'sample_models/{m}.onnx'); sh=S.infer(M,{})
    t=trace(prepare(M,sh)); data=open_data(f'sample_models/{d}.npz',M,t.shapes)
    c=criteria.counts(criteria.Context(t,M,t.shapes,data))
    for f in t.families:
        v=np.sort(c[f.units]); print(f.name,len(v),'zero',(v==0).sum(),v[:40],v[-3:])
    e=exact(t,data)
    print(e.removable.sum(), e.constant.sum())
    for k,x in e.extremes.items(): print(k,np.sort(x.high)[:20])
