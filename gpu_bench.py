import sys, json, os, itertools, time
import torch, triton
from dataclasses import replace
from decay_core import kernel_seam
from kernels import triton_scalar as S, triton_vector as V
BIG=(32,2048,16,64,64)
def data(shape, vec, dtype=torch.bfloat16):
    B,T,H,K,Vd=shape
    torch.manual_seed(0)
    q,k=[torch.randn(B,T,H,K,device='cuda').to(dtype) for _ in range(2)]
    v,do=[torch.randn(B,T,H,Vd,device='cuda').to(dtype) for _ in range(2)]
    g=torch.nn.functional.logsigmoid(torch.randn((B,T,H,K) if vec else (B,T,H),device='cuda')+3)
    return q,k,v,g,do
def med(f): return triton.testing.do_bench(f,warmup=10,rep=50,return_mode='median')
def sconf():
    L=S.Launch
    fw=[L(chunk=c,warps=w,stages=s) for c,w,s in ((64,4,3),(64,4,2),(64,4,1),(128,8,2),(64,8,2),(32,4,3))]
    bw=[L(chunk=c,warps=w,stages=s) for c,w,s in ((64,4,1),(64,4,2),(64,8,1),(64,8,2),(32,4,2),(32,4,3))]
    d=S.default_config(64,64,torch.bfloat16)
    out=[('S',f'f{f.chunk}w{f.warps}s{f.stages}',replace(d,forward=f,backward=replace(d.backward,chunk=f.chunk)),'f') for f in fw]
    out+=[('S',f'b{b.chunk}w{b.warps}s{b.stages}',replace(d,forward=replace(d.forward,chunk=b.chunk),backward=b),'b') for b in bw]
    return out
def vconf():
    d=V.default_config(64,64,torch.bfloat16)
    out=[('V','default',d,'fb')]
    for c,bl in ((64,32),(32,32),(128,64)):
        out.append(('V',f'c{c}b{bl}',replace(d,chunk=c,forward_chunk=min(c,64),block=bl),'fb'))
    for w,s in ((4,1),(4,3),(8,2)): out.append(('V',f'fw{w}s{s}',replace(d,warps=w,stages=s),'f'))
    for w,s in ((4,1),(4,2),(8,1),(8,2)):
        for b in ('fused','split'): out.append(('V',f'b{b}gw{w}s{s}',replace(d,gradient_warps=w,gradient_stages=s,backward=b),'b'))
    for w,s in ((4,2),(4,3),(8,2),(2,2)): out.append(('V',f'ww{w}s{s}',replace(d,walk_warps=w,walk_stages=s,backward='split'),'b'))
    for f in ('split',): out.append(('V',f'fwd{f}',replace(d,forward=f),'f'))
    for w,s in ((4,1),(4,2),(4,3),(2,2)): out.append(('V',f'fc32w{w}s{s}',replace(d,forward_chunk=32,block=32,warps=w,stages=s),'f'))
    out.append(('V','c32split',replace(d,chunk=32,forward_chunk=32,block=32,backward='split'),'fb'))
    out.append(('V','c32fused',replace(d,chunk=32,forward_chunk=32,block=32,backward='fused'),'fb'))
    return out
def one(cls,tag,conf,what,shape,timed=True):
    M={'S':S,'V':V}[cls]
    q,k,v,g,do=data(shape,cls=='V')
    row=dict(cls=cls,tag=tag,shape=shape)
    try:
        fwd=lambda: M.forward(q,k,v,g,1.0,None,False,True,conf)
        o,_,saved=fwd()
        nof=lambda: M.forward(q,k,v,g,1.0,None,False,False,conf)
        bwd=lambda: M.backward(q,k,v,g,1.0,None,saved,do,None,conf)
        if 'b' in what: bwd()
        if not timed: nof(); torch.cuda.synchronize(); return
        if 'f' in what: row['fwd']=round(med(nof),3); row['fwd_save']=round(med(fwd),3)
        if 'b' in what: row['bwd']=round(med(bwd),3)
        row['MiB']=round(torch.cuda.max_memory_allocated()/2**20)
    except Exception as e: row['error']=f'{type(e).__name__}: {str(e)[:150]}'
    print('ROW '+json.dumps(row),flush=True)
    torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
confs=sconf()+vconf()
if sys.argv[1]=='compile':
    i,n=int(sys.argv[2]),int(sys.argv[3])
    small=(2,2048,16,64,64)
    for c in confs[i::n]: one(*c,small,timed=False)
else:
    for c in confs: one(*c,BIG)
    for shape in ((32,2048,12,64,64),(32,2048,32,64,64),(32,2048,16,128,64),(8,8192,16,128,128),(1,65536,16,64,64)):
        one('S','default',S.default_config(shape[3],shape[4],torch.bfloat16),'fb',shape)
        one('V','default',V.default_config(shape[3],shape[4],torch.bfloat16),'fb',shape)
